"""From what people see to what it is: nbs/symptoms.ipynb, made from the doctor's own tables
(`python tests/check.py --fix`).
"""

from house import written_notebook
from pvtblip.doctor import CHECKS, LESSONS, NEEDED, symptom_index


def checks():
    "A row for each check: what it asks, what it needs, the lesson."
    lines = ['| check | asks | needs | lesson |', '| --- | --- | --- | --- |']
    for name, lesson in LESSONS.items():
        needs, check = CHECKS[name]
        text = ', '.join(NEEDED[need].replace('`', '') for need in needs if need not in ('numbers', 'time'))
        asks = ' '.join(check.__doc__.split())
        lines.append(f'| `{name}` | {asks} | {text or "a captioner"} | [{lesson}]({lesson}.ipynb) |')
    return '\n'.join(lines)


def page():
    "The text of nbs/symptoms.ipynb."
    return [
        '# When a captioner misbehaves\n\n> From what one sees to the checks that look there, what it turned out to be,'
        ' and the lesson that teaches the right way',
        'Ask the doctor first; it takes less than a minute, and changes nothing:\n\n'
        '```\npvtblip doctor --model model --images photos --captions captions.json\n```\n\n'
        'In Python it is `examine(captioner, batch)` of [09_doctor](09_doctor.ipynb), for ours, two of transformers, '
        'or any function of photos and words. Each fault can be put into a sound captioner with '
        "`with bug('pixels_twice'):` ([08_six_bugs](08_six_bugs.ipynb)).\n\n"
        f'## By symptom\n\n{symptom_index()}\n\n'
        '*The numbers are public reports with that cause, of 178 that were read. They were searched for by symptom, so '
        'rare traps are over-represented; the order in a row is what counts.*\n\n'
        f'## By check\n\nIn the order in which they would have explained most reports.\n\n{checks()}',
    ]


def notebook():
    "nbs/symptoms.ipynb as it is written."
    return written_notebook('symptoms', page())
