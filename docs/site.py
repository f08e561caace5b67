"""What MkDocs makes of pages that lie outside docs/, and of the public names: hooks of mkdocs.yml."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import timm_tinyvit

ROOT = Path(__file__).parents[1]
PAGES = {'README.md': 'index.md', 'CONTRIBUTING.md': 'contributing.md', 'CHANGELOG.md': 'changelog.md'}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages at the root of the repository; a link of theirs to what is no page keeps its text alone."""

    def on_site(link: re.Match) -> str:
        text, path, anchor = link.groups()
        page = PAGES.get(path, path.removeprefix('docs/'))
        return f'[{text}]({page}{anchor})' if page in PAGES.values() or files.get_file_from_path(page) else text

    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding='utf-8')
        text = re.sub(r'\[([^\]]*)\]\((?!https?:)([^)#]*)((?:#[^)]*)?)\)', on_site, text)
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """End the reference page with whatever the package hands out, where it is defined."""
    if page.file.src_uri != 'reference.md':
        return markdown
    names = [getattr(timm_tinyvit, name) for name in sorted(timm_tinyvit.__all__, key=str.lower)]
    return '\n\n'.join([markdown, *(
        f'::: {item.__module__}.{item.__qualname__}' for item in names if hasattr(item, '__qualname__'))])
