"""Inputs that the command must refuse in one line, odd ones that it must take (cases as data), and what runs them."""
