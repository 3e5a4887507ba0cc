"""The colours of the kinds of tasks, in pictures and in pages."""

# After Okabe and Ito, for the colour-blind; in grey print F is darkest, then W, B and I.
COLORS = {"F": "#0A5A94", "B": "#E69F00", "I": "#F7D06B", "W": "#009E73"}
NAMES = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient"}
