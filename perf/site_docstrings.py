"""An extension of griffe, which reads the sources for the API reference: docstrings as markdown."""

import griffe

from perf.docstrings import listed


class Docstrings(griffe.Extension):
    def on_function(self, *, func, **_):
        if "unknown" in func.parameters:  # only there for its error message
            del func.parameters["unknown"]
        if func.docstring:
            names = {name for x in func.parameters for name in (x.name, x.name.lstrip("*"))}
            func.docstring.value = listed(func.docstring.value, names)
