"""Evaluation: sets of problems, answers drawn and judged once each, what they amount to, and a page of them."""
