"""The demo: one model across the four hospitals of the UCI Heart Disease data, which ship with fedkit."""
