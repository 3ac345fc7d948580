"""Layers inside ``torch.compile`` and ``torch.export``: custom operators, taken only while torch traces."""
