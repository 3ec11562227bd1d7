"""Boxes, points and references in replies: parsing, mapping to pixels, drawing."""
