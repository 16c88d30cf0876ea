"Results that lie in a file row by row, so that a benchmark that was stopped goes on where it was."

from pvtblip.files import read_json


def stored_rows(
    file,  # a Path, or None where nothing is kept
    settings: dict,  # that all rows share
) -> dict:  # settings, results
    "What the file holds already; SystemExit where it was made with other settings."
    stored = read_json(file, dict) if file and file.is_file() else dict(settings=settings, results={})
    if stored['settings'] != settings:
        raise SystemExit(f'{file} was made with {stored["settings"]}; choose another file')
    return stored
