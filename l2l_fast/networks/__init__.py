"""phi: the coordinatewise LSTM and NTM-BFGS with its memory, in files, imported from elsewhere, shipped."""
