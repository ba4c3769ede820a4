"""What the pages that raydpo writes have in common: one file each, no network, light and dark, from a phone to a wide
screen."""
