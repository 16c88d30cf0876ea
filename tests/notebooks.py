"""nbdev_test, once and for two things: the notebooks run, and what they print is what is committed. Arguments
are nbdev_test's own.
"""

import difflib, sys

from execnb.shell import CaptureShell
from nbdev.test import nbdev_test


def printed(cell):
    """The text that a cell printed or returned; None where it shows a picture, or says itself that its
    numbers vary.
    """
    outputs = cell.get('outputs') or []
    if 'varies' in (getattr(cell, 'directives_', None) or {}) or any(
        kind.startswith('image/') for output in outputs for kind in output.get('data', {})
    ):
        return None
    texts = [
        output['text'] if output.get('name') == 'stdout' else output.get('data', {}).get('text/plain', '')
        for output in outputs
    ]
    return ''.join(text if isinstance(text, str) else ''.join(text) for text in texts).strip()


def compared(run_all):
    "`CaptureShell.run_all` that ends in an error where a cell prints something else than before."

    def run(shell, nb, preproc, **options):
        before = {}

        def note(cell):
            if skip := preproc(cell):
                return skip
            before[cell.idx_], cell.outputs = printed(cell), []

        run_all(shell, nb, preproc=note, **options)
        for cell in nb.cells:
            committed = before.get(cell.idx_)
            now = printed(cell)
            if committed is None or now is None or committed == now:
                continue
            lines = difflib.unified_diff(
                committed.splitlines(), now.splitlines(), 'committed', 'printed now', lineterm=''
            )
            print(
                f'{shell.path if hasattr(shell, "path") else ""} cell {cell.idx_}, '
                f'{cell.source.splitlines()[0]!r}:',
                *lines,
                sep='\n',
                file=sys.stderr,
            )
            shell.exc = AssertionError(
                f'cell {cell.idx_} prints something else than what is committed; run the notebook and '
                'save it, or mark the cell #| varies'
            )
        if shell.exc:
            raise shell.exc

    return run


if __name__ == '__main__':
    CaptureShell.run_all = compared(CaptureShell.run_all)
    nbdev_test()
