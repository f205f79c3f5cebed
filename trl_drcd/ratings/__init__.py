"""
People's ratings, Section 3.5 and Appendix C.2 of https://huggingface.co/papers/2410.06084: which pairs of clips are
rated by whom (design), where ratings are stored, and what they say (win rates, Bradley-Terry scores, agreement).
"""
