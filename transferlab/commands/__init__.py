"""The verbs of the command line, by what they are about; `cli.py` names them."""
