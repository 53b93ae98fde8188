"""Sphinx extension: a link to a term of the glossary shows the term's definition while the pointer is on it."""

import re

from docutils import nodes
from sphinx import addnodes

LONGEST = 300  # characters


def setup(app):
    app.connect("doctree-resolved", show_definitions)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}


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
