"""Sphinx extension: chapters link the first use of each term, and a link shows the term's definition.

The links are made here and not written in the notebooks, where Colab and JupyterLab could not follow them.
"""

import re

from docutils import nodes
from sphinx import addnodes

LONGEST = 300  # characters
CHAPTERS, GLOSSARY = "notebooks/", "book/glossary.md"
# What stays as it is: links, code and formulas, headings, tables, and what a cell puts out
UNLINKED = (nodes.reference, nodes.literal, nodes.math, nodes.title, nodes.table, nodes.image)


def setup(app):
    app.connect("source-read", follow_the_glossary)
    app.connect("doctree-resolved", link_first_uses, priority=400)
    app.connect("doctree-resolved", show_definitions)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}


def follow_the_glossary(app, page, _):
    """Have a page made anew when the glossary or this file changes, and not only when itself does."""
    for path in (GLOSSARY, __file__):
        app.env.note_dependency(path)


def link_first_uses(app, doctree, page):
    """In a chapter, make a link of the first use of each term, in one of its forms, in the running text."""
    if not page.startswith(CHAPTERS):
        return
    objects = app.env.get_domain("std").get_objects()
    terms = {name: (of, anchor) for name, _, kind, of, anchor, _ in objects if kind == "term"}
    terms |= {name[0].upper() + name[1:]: at for name, at in terms.items()}
    longest_first = sorted(map(re.escape, terms), key=len, reverse=True)
    pattern, linked = re.compile(rf"\b({'|'.join(longest_first)})s?\b"), set()
    for text in running(doctree):
        parts, end = [], 0
        for match in pattern.finditer(text):
            of, anchor = terms[match[1]]
            if anchor not in linked:
                linked.add(anchor)
                uri = f"{app.builder.get_relative_uri(page, of)}#{anchor}"
                name = nodes.inline("", match[0], classes=["xref", "std", "std-term"])
                parts += [nodes.Text(text[end : match.start()])]
                parts += [nodes.reference("", "", name, internal=True, refuri=uri)]
                end = match.end()
        if parts:
            text.parent.replace(text, [*parts, nodes.Text(text[end:])])


def running(doctree):
    """The text nodes of the paragraphs that somebody wrote."""
    unlinked = {id(text) for node in doctree.findall(apart) for text in node.findall(nodes.Text)}
    found = [text for each in doctree.findall(nodes.paragraph) for text in each.findall(nodes.Text)]
    return [text for text in found if id(text) not in unlinked]


def apart(node):
    """Whether a node is one of `UNLINKED`, or a cell with what it put out."""
    return isinstance(node, UNLINKED) or (
        isinstance(node, nodes.Element) and "cell" in node.get("classes", ())
    )


def show_definitions(app, doctree, _):
    """Give each link to a term the definition as its title."""
    found = None
    for link in doctree.findall(nodes.reference):
        if any("std-term" in child.get("classes", ()) for child in link.findall(nodes.inline)):
            found = definitions(app.env) if found is None else found
            anchor = link.get("refid") or link.get("refuri", "").rpartition("#")[2]
            if anchor in found:
                link["reftitle"] = found[anchor]


def definitions(env):
    """{anchor of a term: its definition in plain text}."""
    found = {}
    objects = env.get_domain("std").get_objects()
    for page in {page for _, _, kind, page, _, _ in objects if kind == "term"}:
        for item in env.get_doctree(page).findall(nodes.definition_list_item):
            text = plain(item.next_node(nodes.definition))
            text = text if len(text) <= LONGEST else text[: LONGEST - 1].rsplit(" ", 1)[0] + "…"
            for term in item.findall(nodes.term):
                found |= dict.fromkeys(term["ids"], text)
    return found


def plain(definition):
    """Its text, without references to papers."""
    definition = definition.deepcopy()
    for reference in list(definition.findall(addnodes.pending_xref)):
        if reference.get("refdomain") == "cite":
            reference.parent.remove(reference)
    return re.sub(r"\s+([.,;])", r"\1", " ".join(definition.astext().split()))
