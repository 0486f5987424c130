"""Which models can be trained with a clip on each row's gradient, why others cannot, and what can be done about it."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator
from typing import TypeAlias

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from fedkit.errors import IncompatibleStrategy
from fedkit.privacy.layers import is_kept
from fedkit.task import Task

__all__ = ["check", "fix", "quietly_loaded", "require_private"]

_MOST_GROUPS = 32  # of a GroupNorm (Wu and He 2018)
_FIXABLE = "fedkit.privacy.fix(model) does it"


@contextlib.contextmanager
def quietly_loaded() -> Iterator[None]:
    """Opacus takes over the root logger when it is loaded; here it gets none."""
    before = logging.root.handlers[:]
    try:
        yield
    finally:
        logging.root.handlers[:] = before


# -- what is wrong -----------------------------------------------------------------------------------------------------


def check(model: nn.Module) -> list[str]:
    """Why `model` cannot be trained with example-level privacy, in sentences that name the remedy; empty if it can.

    Guarantee: a model with nothing on this list has no layer that is known to mix rows, or to keep what it saw.

    Does not protect against: code of one's own that mixes rows or keeps data, which is found, if at all, where the work
    begins: the first rows in one batch are compared with each of them alone, and buffers must stay as they are.
    """
    found = [] if any(p.requires_grad for p in model.parameters()) else ["the model has no parameter to train"]
    for name, layer in model.named_modules():
        said = next((text for rule in _RULES if (text := rule(layer)) is not None), None)
        if said is not None:
            found.append(f"{name or 'the model'} ({type(layer).__name__}) {said}")
    return found


def require_private(task: Task, module: nn.Module) -> None:
    """Raises `IncompatibleStrategy` with all reasons why the task cannot be trained with example-level privacy."""
    reasons = _about_learning(task) + check(module)
    if reasons:
        raise IncompatibleStrategy(f"{task.name} cannot be trained with example-level privacy: {'; '.join(reasons)}")


def _about_learning(task: Task) -> list[str]:
    if task.train is not None:
        return ["it has its own train loop, for which nobody can vouch: give loss or step"]
    reduction = getattr(task.loss, "reduction", "mean")
    if reduction != "mean":
        return [f"its loss has reduction={reduction!r}, and each row's share must not depend on the others: 'mean'"]
    if isinstance(task.loss, nn.CrossEntropyLoss | nn.NLLLoss) and task.loss.weight is not None:
        return [
            f"{type(task.loss).__name__}(weight=...) divides by the weights of all rows of a batch, so that one row "
            "changes what the others count: use lambda outputs, targets: (weight[targets] * "
            'cross_entropy(outputs, targets, reduction="none")).mean()'
        ]
    return []


Rule: TypeAlias = Callable[[nn.Module], str | None]


def _norms(layer: nn.Module) -> str | None:
    if isinstance(layer, _BatchNorm):
        return f"makes each row depend on the others of its batch: use GroupNorm; {_FIXABLE}"
    if isinstance(layer, _InstanceNorm) and layer.track_running_stats:
        return f"keeps running statistics, which no clip bounds: use track_running_stats=False; {_FIXABLE}"
    return None


def _in_place(layer: nn.Module) -> str | None:
    if getattr(layer, "inplace", False) is True:
        return f"overwrites its input, which the gradients of single rows need: use inplace=False; {_FIXABLE}"
    return None


def _recurrent(layer: nn.Module) -> str | None:
    if not isinstance(layer, nn.RNNBase):
        return None
    if layer.proj_size:
        return (
            "computes its gradients for all rows at once, and with proj_size nothing replaces it: leave proj_size out"
        )
    return f"computes its gradients for all rows at once: use opacus.layers.DP{_kind(layer)}; {_FIXABLE}"


def _attention(layer: nn.Module) -> str | None:
    if isinstance(layer, nn.MultiheadAttention):
        return (
            "uses its weights without calling their layers: write the projections as nn.Linear and call "
            "torch.nn.functional.scaled_dot_product_attention"
        )
    return None


def _embeddings(layer: nn.Module) -> str | None:
    if isinstance(layer, nn.EmbeddingBag):
        return "has no first dimension of rows: use nn.Embedding and a mean over its second dimension"
    if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
        return "with max_norm rescales the entries that were looked up, which shows them: leave max_norm out"
    if isinstance(layer, nn.Embedding) and (layer.sparse or layer.scale_grad_by_freq):
        return "with sparse or scale_grad_by_freq has no gradient of single rows: leave both out"
    return None


def _parameters(layer: nn.Module) -> str | None:
    own = {name for name, parameter in layer.named_parameters(recurse=False) if parameter.requires_grad}
    if isinstance(layer, nn.ParameterList | nn.ParameterDict) and own:
        return "holds parameters that no layer of theirs is called for: give each to the module that uses it"
    if is_parametrized(layer) or (is_kept(layer) and not own <= {"weight", "bias"}):
        return "computes its weight from other parameters: use it without weight_norm, spectral_norm and the like"
    inner = isinstance(layer, ParametrizationList)  # what holds it is named already
    if own and not inner and not is_kept(layer) and any(True for _ in layer.buffers()):
        return "has parameters and buffers in one module: put the parameters into a module without buffers"
    return None


_RULES: tuple[Rule, ...] = (_norms, _in_place, _recurrent, _attention, _embeddings, _parameters)


# -- what can be done --------------------------------------------------------------------------------------------------


def fix(model: nn.Module) -> nn.Module:
    """A copy of `model` in which all that can be replaced is, so that everyone gets the same architecture.

    | layer | becomes |
    |---|---|
    | BatchNorm1d | GroupNorm with one group, which is what rows without further dimensions need |
    | BatchNorm2d, BatchNorm3d, SyncBatchNorm | GroupNorm with at most 32 groups of two or more channels |
    | InstanceNorm with running statistics | the same without them |
    | anything with `inplace=True` | the same without it |
    | LSTM, GRU, RNN | Opacus' DPLSTM, DPGRU, DPRNN, which are slower and compute the same |

    Weights are kept, running statistics are not; all other layers keep their names. The result depends on nothing but
    the model. `check` says what is left.
    """
    fixed = copy.deepcopy(model)
    replaced = {id(layer): _replacement(layer) for layer in fixed.modules()}
    if replaced[id(fixed)] is not None:
        return _plain(replaced[id(fixed)] or fixed)
    for name, layer in list(fixed.named_modules(remove_duplicate=False)):
        new = replaced.get(id(layer))
        if new is not None:
            fixed.set_submodule(name, new)
    return _plain(fixed)


def _plain(model: nn.Module) -> nn.Module:
    for layer in model.modules():
        if getattr(layer, "inplace", False) is True:
            layer.__dict__["inplace"] = False
    return model


def _replacement(layer: nn.Module) -> nn.Module | None:
    """What stands in for the layer, on its device, in its dtype and mode; None where it may stay or nothing does."""
    new: nn.Module
    if isinstance(layer, _BatchNorm):
        new = _group_norm(layer)
    elif isinstance(layer, _InstanceNorm) and layer.track_running_stats:
        new = type(layer)(layer.num_features, eps=layer.eps, affine=layer.affine)
    elif isinstance(layer, nn.RNNBase) and not layer.proj_size:
        new = _recurrent_of_rows(layer)
    else:
        return None
    for name, parameter in layer.named_parameters(recurse=False):
        own = dict(new.named_parameters(recurse=False))[name]
        own.data = parameter.data
        own.requires_grad_(parameter.requires_grad)
    return new.train(layer.training)


def _group_norm(layer: _BatchNorm) -> nn.GroupNorm:
    channels = layer.num_features
    fit = [groups for groups in range(1, _MOST_GROUPS + 1) if channels % groups == 0 and channels >= 2 * groups]
    groups = 1 if isinstance(layer, nn.BatchNorm1d) else max(fit, default=1)
    return nn.GroupNorm(groups, channels, eps=layer.eps, affine=layer.affine)


def _recurrent_of_rows(layer: nn.RNNBase) -> nn.Module:
    with quietly_loaded():
        from opacus import layers

    names = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional")
    settings = {name: getattr(layer, name) for name in names}
    if isinstance(layer, nn.RNN):
        settings["nonlinearity"] = layer.nonlinearity
    with torch.random.fork_rng(devices=[]):
        new: nn.Module = getattr(layers, f"DP{_kind(layer)}")(**settings)
    return new


def _kind(layer: nn.RNNBase) -> str:
    return next(kind.__name__ for kind in (nn.LSTM, nn.GRU, nn.RNN) if isinstance(layer, kind))
