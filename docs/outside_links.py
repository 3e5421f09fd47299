"""Links from a page to a file beside `docs/`: right on GitHub as they stand, and turned into GitHub's for the site."""

import re
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
GITHUB = "https://github.com/dentalgemma/dentalgemma"
RELATIVE = re.compile(r"\]\((?P<path>\.\./[^)#\s]*)(?P<fragment>#[^)\s]*)?\)")


def on_page_markdown(markdown: str, *, page, **_) -> str:
    """MkDocs calls it with each page. A link to nothing stays as it is, and MkDocs says that it leads nowhere."""
    folder = (REPOSITORY / "docs" / page.file.src_uri).parent

    def replace(link: re.Match) -> str:
        target = (folder / link["path"]).resolve()
        if not target.exists() or not target.is_relative_to(REPOSITORY):
            return link[0]
        kind = "tree" if target.is_dir() else "blob"
        return f"]({GITHUB}/{kind}/main/{target.relative_to(REPOSITORY).as_posix()}{link['fragment'] or ''})"

    return RELATIVE.sub(replace, markdown)
