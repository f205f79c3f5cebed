"""
Human evaluation, Section 3.5 and Appendix C.2 of https://huggingface.co/papers/2410.06084: the design of a study, the
storage of ratings, and their analysis (win rates, Bradley-Terry scores, agreement).
"""
