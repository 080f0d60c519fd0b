from textwrap import dedent

from kimi_pretrain.data.documents import Defect, Document
from kimi_pretrain.data.python_text import module_name, prose


def test_docstrings_in_order_under_their_names(tmp_path):
    package = tmp_path / "pack"
    package.mkdir()
    (package / "__init__.py").write_text("")
    path = package / "mod.py"
    source = '''
        """Module."""
        class A:
            """Class A.

            Indented.
                More.
            """
            def f(self):
                """Method f."""
                x = "not a docstring"
        if True:
            async def g():
                "Function g."
        def silent(): pass
    '''
    (document,) = prose(path, dedent(source).encode())
    assert document.text == (
        "pack.mod\n\nModule.\n\n\n"
        "pack.mod.A\n\nClass A.\n\nIndented.\n    More.\n\n\n"
        "pack.mod.A.f\n\nMethod f.\n\n\n"
        "pack.mod.g\n\nFunction g."
    )


def test_attached_texts_are_documents_of_their_own(tmp_path):
    long = "Absolute value. " * 10
    source = f'''
add_docstr(torch.abs, r"""abs(input)
{long}""".format(**common) + """
More of it, which is long enough to count as text and not as the name of an object here.""")
add_newdoc("numpy", "ndarray", ("dtype", """{long}"""))
print("some other call with a long text that is not documentation of anything, at all, really")
'''
    first, second, rest = prose(tmp_path / "docs.py", source.encode())
    assert first.text.startswith("torch.abs\n\nabs(input)")
    assert first.text.index("Absolute") < first.text.index("More of it")
    assert second.text.startswith("numpy.ndarray.dtype\n\nAbsolute")
    assert rest == Document("")


def test_topics_and_descriptions(tmp_path):
    source = b"topics = {'assert': 'The statement\\n', 'break': 'Another \\n'\n 'line'}"
    assert [item.text for item in prose(tmp_path / "topics.py", source)] == [
        "The statement",
        "Another \nline",
    ]
    metadata = "Metadata-Version: 2.1\nName: x\nLicense: MIT\n\n# Title\n\nWörds.\n".encode()
    (document,) = prose(tmp_path / "METADATA", metadata)
    assert document.text == "# Title\n\nWörds.\n"


def test_unparsable_file_is_a_defect(tmp_path):
    (defect,) = prose(tmp_path / "bad.py", b"def (:")
    assert isinstance(defect, Defect)


def test_module_name_stops_where_packages_do(tmp_path):
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    for folder in (tmp_path / "a", inner):
        (folder / "__init__.py").write_text("")
    assert module_name(inner / "c.py") == "a.b.c"
    assert module_name(inner / "__init__.py") == "a.b"
    assert module_name(tmp_path / "top.py") == "top"
