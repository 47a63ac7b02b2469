"""How well text can be read on a colour."""

from matplotlib.colors import to_rgb


def contrast(one, other):
    """The contrast ratio of two colours, from 1 to 21 (WCAG 2); 4.5 is enough for normal text."""
    low, high = sorted(map(luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


def luminance(colour):
    channels = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour))
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), channels))
