"""Text that every Python installation has: docstrings, and whose they are.

Which package of the standard library does a docstring come from? The source
files are parsed, not imported, so that the data set is the same wherever the
Python version is the same, and needs neither a network nor a display.
"""

import ast
import collections
import pathlib
import random
import re
import sysconfig

PACKAGES = (
    "asyncio",
    "email",
    "http",
    "logging",
    "multiprocessing",
    "tkinter",
    "unittest",
    "xml",
)
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def load(sizes, *, packages=PACKAGES, library=None, seed=0):
    """Split first paragraphs of docstrings into balanced, disjoint parts.

    Args:
        sizes: Dict of part name -> number of docstrings per package.
        packages: Names of the packages; their index is the label.
        library: Folder of the standard library. Defaults to this Python's.
        seed: Integer. Seed of the split.

    Returns:
        Dict of part name -> `(texts, labels)`, two lists in random order.

    Raises:
        FileNotFoundError: If the sources of a package are not there.
        ValueError: If a package has fewer docstrings than `sizes` ask for.
    """
    library = pathlib.Path(library or sysconfig.get_path("stdlib"))
    texts = [read(library, package) for package in packages]
    # A text that occurs twice, in one package or in two, would be in two parts
    # at once or have two labels; the first such text of a package is kept.
    owners = collections.Counter(key for part in texts for key in part)
    generator = random.Random(seed)
    parts = {name: [] for name in sizes}
    for label, (package, found) in enumerate(zip(packages, texts, strict=True)):
        unique = [text for key, text in found.items() if owners[key] == 1]
        if len(unique) < sum(sizes.values()):
            raise ValueError(
                f'Package "{package}" in {library} has {len(unique)} different '
                f"docstrings, but sizes={sizes} need {sum(sizes.values())} of "
                "each package. Ask for fewer."
            )
        generator.shuffle(unique)
        for name, size in sizes.items():
            taken, unique = unique[:size], unique[size:]
            parts[name] += [(text, label) for text in taken]
    for examples in parts.values():
        generator.shuffle(examples)
    return {
        name: ([t for t, _ in examples], [label for _, label in examples])
        for name, examples in parts.items()
    }


def read(library, package, minimum_words=5):
    """Return first paragraphs by what makes them differ: letters and digits."""
    folder = pathlib.Path(library) / package
    if not any(folder.glob("*.py")):
        raise FileNotFoundError(
            f'This Python has no sources of the package "{package}": {folder} '
            "holds no .py file. Some systems ship it apart (on Debian and "
            "Ubuntu `apt install python3-tk` brings tkinter); or run this with "
            "a Python from python.org, uv, pyenv or conda."
        )
    found = {}
    for path in sorted(folder.rglob("*.py")):
        if {"test", "tests"}.isdisjoint(path.relative_to(folder).parts):
            for node in ast.walk(ast.parse(path.read_bytes())):
                if isinstance(node, DOCUMENTED):
                    text = _first_paragraph(ast.get_docstring(node) or "")
                    if len(text.split()) >= minimum_words:
                        key = " ".join(re.findall(r"\w+", text.lower()))
                        found.setdefault(key, text)
    return found


def _first_paragraph(docstring):
    return " ".join(re.split(r"\n\s*\n", docstring)[0].split())
