"""A hook of mkdocs: pages of the site that lie above docs/."""

from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
ABOVE = ("CONTRIBUTING.md", "CHANGELOG.md")


def on_files(files, config):
    for name in ABOVE:
        text = (ROOT / name).read_text().replace("](docs/", "](")
        files.append(File.generated(config, name, content=text))
    return files
