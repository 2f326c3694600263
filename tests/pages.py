"""Reads a report as a browser would, and insists on what a page of one's own must be."""

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

from PIL import Image

_VOID = {"meta", "img", "link", "br"}


class Page(HTMLParser):
    """A page, parsed; anything that is not well formed, or reaches outside, is an error.

    Attributes:
        text: All text, without that of the style sheet.
        tags: Every element's name.
        pictures: The embedded pictures, decoded.
        cells: The texts of the rows of all tables.
        links: Where anchors lead.
        drawings: The points of each line of each drawing.
    """

    def __init__(self, path: Path):
        super().__init__(convert_charrefs=True)
        self.text, self.tags, self.pictures, self.cells = "", [], [], []
        self.links, self.ids, self.drawings, self._open = [], set(), [], []
        content = path.read_text("utf-8")
        assert content.startswith("<!DOCTYPE html>\n") and "\0" not in content
        self.feed(content)
        self.close()
        assert self._open == [], f"never closed: {self._open}"
        anchors = {link[1:] for link in self.links if link.startswith("#")}
        assert anchors <= self.ids

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        assert len(attributes) == len(attrs), f"{tag} has an attribute twice"
        assert not {"script", "iframe", "object", "embed", "link", "base", "form"} & {tag}
        for name, value in attributes.items():
            assert not name.startswith("on"), f"{tag} runs {name}"
            assert "javascript:" not in value.lower()
        if tag == "img":
            kind, _, content = attributes["src"].partition(",")
            assert kind == "data:image/png;base64"
            picture = Image.open(io.BytesIO(base64.b64decode(content, validate=True)))
            picture.load()
            assert picture.size == (int(attributes["width"]), int(attributes["height"]))
            self.pictures.append(picture)
        elif "src" in attributes:
            raise AssertionError(f"{tag} loads {attributes['src']}")
        if "href" in attributes:
            link = attributes["href"]
            assert (
                link.startswith("#") or link == "generator/report.html" or "download" in attributes
            )
            self.links.append(link)
        if tag == "polyline" and attributes["class"] != "grid":
            pairs = [place.split(",") for place in attributes["points"].split()]
            self.drawings.append([(float(x), float(y)) for x, y in pairs])
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")
        self.ids.add(attributes.get("id"))
        self.tags.append(tag)
        if tag not in _VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open and self._open[-1] == tag, f"</{tag}> closes {self._open[-1:]}"
        self._open.pop()

    def handle_data(self, data):
        if self._open and self._open[-1] == "style":
            assert not re.search(r"url\(|@import|://", data)
            return
        self.text += data
        if self._open and self._open[-1] in ("td", "th"):
            self.cells[-1][-1] += data

    def handle_pi(self, data):
        raise AssertionError(f"<?{data}>")

    def handle_comment(self, data):
        raise AssertionError(f"<!--{data}-->")
