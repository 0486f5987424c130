"""What each simulated site of NVIDIA FLARE runs: returns the received model with one added to its first element."""

import nvflare.client as flare

flare.init()
while flare.is_running():
    received = flare.receive()
    if received is None:
        break
    vector = received.params["numpy_key"]
    vector = vector if vector.flags.writeable else vector.copy()
    vector[0] += 1
    flare.send(flare.FLModel(params={"numpy_key": vector}, meta={"NUM_STEPS_CURRENT_ROUND": 1}))
