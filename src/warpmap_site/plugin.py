"""The thin layer that binds the site's functions to MkDocs 1.x."""

import logging
from pathlib import Path

from jinja2 import Environment
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.plugins import BasePlugin
from mkdocs.structure.files import File, Files
from mkdocs.structure.nav import Navigation
from mkdocs.structure.pages import Page
from mkdocs.utils.templates import TemplateContext

from warpmap_site import pages
from warpmap_site.atlas import KINDS, PLACES, Atlas
from warpmap_site.fences import Fences
from warpmap_site.loading import AtlasError, load_atlas
from warpmap_site.reports import last_passes

BUNDLE = Path(__file__).parent / "theme/assets/bundle/main.js"
log = logging.getLogger("mkdocs.plugins.warpmap")


# MkDocs leaves BasePlugin and the names of templates half typed
class WarpmapPlugin(BasePlugin):  # type: ignore[no-untyped-call,type-arg]
    """Draws the map, adds what pages have in common, checks the trees."""

    root: Path
    atlas: Atlas

    def on_config(self, config: MkDocsConfig) -> None:
        """Read the map; bind the fences to the repository."""
        self.root = Path(config.config_file_path).parent
        try:
            self.atlas = load_atlas(self.root)
        except AtlasError as error:
            raise PluginError(str(error)) from error
        fences = Fences(self.root, config.extra.get("source_url") or "")
        config.mdx_configs.setdefault("pymdownx.superfences", {})[
            "custom_fences"
        ] = fences.superfences()
        if not BUNDLE.exists():
            log.info("no JavaScript bundle: run 'python web/build.py' for it")

    def on_files(self, files: Files, config: MkDocsConfig) -> Files:
        """Add the reference, one page a module, and an index of decisions."""
        written = pages.reference_pages(self.root, self.atlas)
        written["decisions/index.md"] = pages.decision_index(self.root)
        for path, text in written.items():
            files.append(File.generated(config, path, content=text))
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
        )
        return context
