"""README says what the code has: every flag, and every file of the tree."""

from conftest import ROOT

from dlrm_xla import flags

README = (ROOT / "README.md").read_text()


def test_flag_table_is_the_parsers():
    assert flags.markdown_table() in README, "python -m dlrm_xla.flags prints the table for README"


def test_tree_names_every_module():
    tree = README.split("## The tree")[1].split("```")[1]
    for path in sorted((ROOT / "dlrm_xla").glob("*.py")):
        assert path.name == "__init__.py" or path.name in tree, f"{path.name} is missing in README's tree"


def test_no_criteo_row_in_the_repository():
    """Their terms forbid it: no tracked text holds a line of their format."""
    import re
    import subprocess

    row = re.compile(rb"^[01]\t(-?\d*\t){13}([0-9a-f]{8}|\t)", re.M)
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.split(b"\0")
    for name in filter(None, listed):
        assert not row.search((ROOT / name.decode()).read_bytes()), name
