"""The traced network: which channels are coupled, and the physical removal of channels."""
