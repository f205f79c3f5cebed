"""What is looked at before anything is loaded: arguments, YAML files, folders of models, files of prompts."""
