"""What a browser would find in a report page, read with the standard library alone."""

from html.parser import HTMLParser

VOID = {"meta", "img", "input", "link", "br", "hr", "line", "rect"}


class Page(HTMLParser):
    """What a browser would find in the page: elements with attributes, text by table, scripts."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.text = ""
        self._open: list[str] = []
        self._table: list[list[str]] | None = None
        self.feed(text)
        self.close()
        assert self._open == [], self._open

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "script":
            self.scripts.append((attributes, ""))
        if tag == "table":
            self._table = self.tables.setdefault(attributes.get("class") or "", [])
        if tag == "tr" and self._table is not None:
            self._table.append([])
        if tag in ("td", "th") and self._table is not None:
            self._table[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag
        if tag == "table":
            self._table = None

    def handle_data(self, data):
        if self._open and self._open[-1] == "script":
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
            return
        self.text += data
        if self._table and self._table[-1] and {"td", "th"} & set(self._open):
            self._table[-1][-1] += data.strip()
