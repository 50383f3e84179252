"""Editing methods, one file each; a method knows no data and no training, and never imports another."""
