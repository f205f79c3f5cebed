"""
Hear it, steer it, rate it: one Gradio application with the tabs Play, Listen and Rate, each usable alone, and a static
page of an evaluation's samples. Nothing is loaded from elsewhere.
"""
