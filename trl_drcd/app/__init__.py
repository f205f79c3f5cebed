"""
Web application (Gradio) with the tabs Play, Listen and Rate, each usable alone, and a static page of an evaluation's
samples. No remote resources are loaded.
"""
