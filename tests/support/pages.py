"""HTML pages read back: by an HTML parser, and the pixels of their pictures."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
from PIL import Image

LOADED = {'src', 'href', 'xlink:href', 'data', 'srcset', 'poster', 'action'}


class Reader(HTMLParser):
    """What an HTML parser finds in a page: tags with their attributes, the text, and whether every tag is closed."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text, self.open = [], '', []
        self.feed(page)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ('meta', 'link', 'img'):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def check_self_contained(page):
    """Nothing is loaded from anywhere and nothing runs; inner references have their targets."""
    found = Reader(page)
    names = [attributes['id'] for _, attributes in found.tags if 'id' in attributes]
    assert len(names) == len(set(names))
    for tag, attributes in found.tags:
        assert tag not in ('script', 'iframe', 'object', 'embed')
        assert not any(name.startswith('on') for name in attributes)
        for name in LOADED & set(attributes):
            assert attributes[name].startswith(('data:', '#')), attributes[name]
            if attributes[name].startswith('#'):
                assert attributes[name][1:] in names
        assert set(re.findall(r'url\(#([^)]*)\)', ' '.join(filter(None, attributes.values())))) <= set(names)
    assert '@import' not in page and not re.search(r'url\((?!#)', page)
    return found


def pixels_of(uri):
    image = Image.open(io.BytesIO(base64.b64decode(uri.partition(',')[2])))
    return np.asarray(image.convert('RGB')).transpose(2, 0, 1)
