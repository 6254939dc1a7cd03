"""Data, losses and loops that train models, and the recipes of the models that ship."""
