"""Who may import whom: packages import downwards only, and no module imports its way back to itself."""

import ast
import graphlib
from pathlib import Path

import timm_tinyvit

ROOT = Path(timm_tinyvit.__file__).parent
# From the ground up; a package imports those on floors below its own. The programs stand on the last one.
FLOORS = [
    {'version'}, {'base', 'targets'}, {'models'}, {'store'}, {'data'}, {'config'}, {'teacher', 'train'}, {'report'},
    {'hub'},
]
# Files that can be taken out and used alone, each with what it imports of this project: nothing but its layers.
ALONE = {
    'models/layers.py': set(),
    'models/tiny_vit.py': {'models.layers'},
    'models/clip_teacher.py': set(),
    'models/imagenet22k.py': set(),
}


def imports_of(file: Path) -> set[str]:
    """Names of this package's modules that a file imports, imports inside functions included, as `room.module`."""
    package = ['timm_tinyvit', *file.relative_to(ROOT).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = '.'.join(package[:len(package) - node.level + 1]) if node.level else ''
            module = '.'.join(filter(None, [start, node.module]))
            names = [module, *(f'{module}.{alias.name}' for alias in node.names)]
        else:
            continue
        found |= {name.removeprefix('timm_tinyvit.') for name in names if name.startswith('timm_tinyvit.')}
    return found


def modules() -> dict[str, set[str]]:
    """Each module, as `room.module`, and the modules that it imports."""
    files = {'.'.join(file.relative_to(ROOT).with_suffix('').parts): file for file in ROOT.rglob('*.py')}
    return {name: imports_of(file) & set(files) for name, file in files.items()}


def test_packages_import_downwards_only():
    floors = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
    upwards = [
        f'{name} imports {other}' for name, others in modules().items() for other in others
        for room, target in [(name.split('.')[0], other.split('.')[0])]
        if room != target and room in floors and floors.get(target, len(FLOORS)) >= floors[room]]
    assert not upwards


def test_no_module_imports_its_way_back_to_itself():
    graphlib.TopologicalSorter(modules()).prepare()


def test_the_models_and_the_targets_know_nothing_of_the_project():
    graph = modules()
    for file, others in ALONE.items():
        assert graph[file.removesuffix('.py').replace('/', '.')] == others
    assert all(other.startswith('targets.') for name in graph if name.startswith('targets.') for other in graph[name])


def test_no_duration_is_measured_by_a_clock_that_somebody_sets():
    """People and servers change what `time.time` says while a program runs."""
    root = ROOT.parent
    files = [*root.glob('*.py'), *(file for folder in ('timm_tinyvit', 'benchmarks', 'examples', 'hub')
                                   for file in root.joinpath(folder).rglob('*.py'))]
    found = []
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                names = {(node.value.id, node.attr)}
            else:
                names = {(node.module, name.name) for name in node.names} if isinstance(node, ast.ImportFrom) else set()
            if names & {('time', 'time'), ('datetime', 'now')}:
                found.append(f'{file.relative_to(root)}, line {node.lineno}')
    assert len(files) > 90 and found == []
