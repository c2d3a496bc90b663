"""The thin layer that binds the site's functions to MkDocs 1.x."""

import logging
import posixpath
from hashlib import sha256
from pathlib import Path

from jinja2 import Environment
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.plugins import BasePlugin
from mkdocs.structure.files import File, Files
from mkdocs.structure.nav import Navigation
from mkdocs.structure.pages import Page
from mkdocs.utils.templates import TemplateContext
from mkdocs_jupyter.config import settings as jupyter

from warpmap_site import labs, pages
from warpmap_site.atlas import KINDS, PLACES, Atlas
from warpmap_site.browser import archive
from warpmap_site.fences import Fences
from warpmap_site.forms import import_from
from warpmap_site.loading import AtlasError, load_atlas
from warpmap_site.notebooks import notebook
from warpmap_site.reports import last_passes

BUNDLE = Path(__file__).parent / "theme/assets/bundle/main.js"
MODULES = "assets/modules.zip"
SOURCE = '<details class="mkdocstrings-source"'  # of an object in the reference
log = logging.getLogger("mkdocs.plugins.warpmap")


# MkDocs leaves BasePlugin and the names of templates half typed
class WarpmapPlugin(BasePlugin):  # type: ignore[no-untyped-call,type-arg]
    """Draws the map, adds what pages have in common, checks the trees."""

    root: Path
    atlas: Atlas
    modules: bytes
    labs: dict[str, labs.Lab]

    def on_config(self, config: MkDocsConfig) -> None:
        """Read the map; bind the fences to the repository."""
        self.root = Path(config.config_file_path).parent
        try:
            self.atlas = load_atlas(self.root)
        except AtlasError as error:
            raise PluginError(str(error)) from error
        import_from(self.root / "src")
        self.labs = {lab.path: lab for lab in labs.load_labs(self.root)}
        jupyter.templates_dir = str(labs.TEMPLATES)
        fences = Fences(
            self.root,
            config.extra.get("source_url") or "",
            self.atlas.topics,
            config.extra.get("colab_url") or "",
        )
        config.mdx_configs.setdefault("pymdownx.superfences", {})[
            "custom_fences"
        ] = fences.superfences()
        if not BUNDLE.exists():
            log.info("no JavaScript bundle: run 'python web/build.py' for it")

    def on_files(self, files: Files, config: MkDocsConfig) -> Files:
        """Add the reference, the decisions, notebooks, the browser's Python."""
        written = pages.reference_pages(self.root, self.atlas)
        written["decisions/index.md"] = pages.decision_index(self.root)
        written["labs/index.md"] = labs.index(list(self.labs.values()))
        source_url = config.extra.get("source_url") or ""
        for topic in self.atlas.topics.values():
            if topic.meta.kind != "survey":
                name = f"notebooks/{topic.path}.ipynb"
                written[name] = notebook(self.root, topic, source_url)
        for path, text in written.items():
            files.append(File.generated(config, path, content=text))
        self.modules = archive(self.root, self.atlas)
        files.append(File.generated(config, MODULES, content=self.modules))
        return files

    def on_page_markdown(
        self, markdown: str, page: Page, config: MkDocsConfig, files: Files
    ) -> str:
        """Choose the template; add aliases and references to topics."""
        path = page.file.src_uri.removesuffix(".md")
        if topic := self.atlas.topics.get(path):
            page.meta["template"] = "topic.html"
            return pages.topic_markdown(self.root, topic, markdown)
        if path.removesuffix("/index") in self.atlas.area_meta:
            page.meta["template"] = "area.html"
        return markdown

    def on_page_content(
        self, html: str, page: Page, config: MkDocsConfig, files: Files
    ) -> str:
        """Make a lab a page of this site; keep the search index small."""
        path = page.file.src_uri.removesuffix(".ipynb")
        if path not in self.labs:
            # every page loads the index: names and docstrings are enough
            return html.replace(SOURCE, f"{SOURCE} data-search-exclude")
        page.meta["template"] = "lab.html"

        def address(link: str) -> str:
            name = posixpath.normpath(f"labs/{link}")
            if (file := files.get_file_from_path(name)) is None:
                raise PluginError(f"docs/{path}.ipynb: there is no {name}")
            return file.url_relative_to(page.file)

        return labs.page_html(html, address)

    def on_env(
        self, env: Environment, config: MkDocsConfig, files: Files
    ) -> None:
        """Give the templates the map."""
        env.globals.update(
            atlas=self.atlas,
            kinds=KINDS,
            places=PLACES,
            has_bundle=BUNDLE.exists(),
            map_data=pages.map_data(self.atlas),
            passes=lambda topic: last_passes(self.root, topic.path),
            labs=list(self.labs.values()),
            browser={
                # an archive that changed has an address of its own
                "modules": f"{MODULES}?{sha256(self.modules).hexdigest()[:8]}",
                "pyodide": config.extra.get("pyodide_url") or "",
                "wheels": config.extra.get("pyodide_wheels") or [],
            },
        )

    def on_page_context(
        self,
        context: TemplateContext,
        /,
        *,
        page: Page,
        config: MkDocsConfig,
        nav: Navigation,
    ) -> TemplateContext:
        """Tell the template which topic or area it prints."""
        path = page.file.src_uri.removesuffix(".md").removesuffix("/index")
        area = path.removeprefix("reference/").split("/")[0]
        known = area in self.atlas.area_meta
        context.update(  # type: ignore[call-arg]
            topic=self.atlas.topics.get(path),
            area=self.atlas.area(area) if known else None,
            lab=self.labs.get(path.removesuffix(".ipynb")),
        )
        return context
