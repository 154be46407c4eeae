"""The README for PyPI, where its links to files of the repository are absolute."""

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


class Readme(MetadataHookInterface):
    """Puts the address that `[project.urls]` has in front of each relative link and image."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set `readme`, as hatchling asks a hook to.

        Args:
            metadata: `[project]` of pyproject.toml.
        """
        address = metadata["urls"]["Repository"]
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        file = r"(?=[\w./#-]+\))"  # of the repository: no scheme
        text = re.sub(rf"(!\[[^]]*\]\(){file}", rf"\1{address}/raw/main/", text)
        text = re.sub(rf"(\]\(){file}", rf"\1{address}/blob/main/", text)
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
