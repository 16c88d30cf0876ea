"""The page as visitors meet it: what they may send, what they are told, what stays behind; where Gradio is
installed over HTTP, and where a browser is too, in that.
"""

import base64, html, http.server, io, json, os, re, shutil, signal, subprocess, sys, threading, time
import urllib.error, urllib.request
from pathlib import Path

import pytest, torch
from hypothesis import given, settings, strategies as st
from PIL import Image

from pvtblip.confidence import fit_confidence
from pvtblip.decoder import Captioner
from pvtblip.demo import demo_config
from pvtblip.fast import load_model
from pvtblip.generation import generate, generate_caption
from pvtblip.page import (
    MOST_BYTES,
    Talk,
    Wishes,
    Uploads,
    create_gradio_demo,
    explain,
    join_words,
    map_uri,
    photo_pixels,
    plainly,
    visitors_photo,
    word_truths,
)
from pvtblip.shapes import make_scene
from test_cli import pvtblip

FIELDS = ('beams', 3, 1.0, 3, '', '', '')  # as the page sends them


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A captioner of the shapes world with random weights."
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp('page') / 'model'
    Captioner(demo_config()).save_pretrained(folder)
    return folder


@pytest.fixture(scope='module')
def model(folder):
    return load_model(folder, 'cpu')


@pytest.fixture
def talk(model, tmp_path):
    return Talk(model, tmp_path)


@pytest.fixture(scope='module')
def drawing():
    return Image.fromarray(make_scene(0, 5, image_size=96).image)


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, 'png')
    return buffer.getvalue()


def told(answer):
    "What a person reads of an answer."
    return html.unescape(re.sub('<style.*?</style>|<[^>]*>', ' ', answer, flags=re.S)).strip()


# words


@given(st.lists(st.text('abcé', min_size=1, max_size=6), min_size=1, max_size=6), st.data())
@settings(deadline=None)
def test_every_token_belongs_to_one_word(words, data):
    tokens, owner = [], []
    for number, word in enumerate(words):
        cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(word) - 1)), max_size=2)) - {len(word)})
        pieces = [word[a:b] for a, b in zip([0, *cuts], [*cuts, len(word)])]
        tokens += [piece if i == 0 else f'##{piece}' for i, piece in enumerate(pieces)]
        owner += [number] * len(pieces)
    maps = torch.nn.functional.one_hot(torch.tensor(owner)).float()[:, None]  # (T, 1, words)
    joined = join_words(' '.join(words), tokens, maps)
    assert [word for word, _ in joined] == words
    torch.testing.assert_close(torch.cat([seen for _, seen in joined]), torch.eye(len(words)))


def test_punctuation_goes_with_its_word():
    text = "a dog's bowl, red."
    tokens = ['a', 'dog', "'", 's', 'bowl', ',', 'red', '.']
    assert [word for word, _ in join_words(text, tokens, torch.zeros(8, 1, 1))] == text.split()


@pytest.mark.parametrize('split', ['unseen_scenes', 'unseen_pairs'])
def test_no_word_of_a_true_caption_is_called_false(split):
    for i in range(60):
        scene = make_scene(2, i, split, max_objects=3)
        for caption in scene.captions:
            truths = word_truths(caption, scene)
            assert len(truths) == len(caption.split()) and False not in truths and True in truths, caption


def test_the_false_one_of_two_equal_words_is_found():
    red = next(
        scene
        for scene in (make_scene(0, i) for i in range(500))
        if [shape.colour == 'red' for shape in scene.objects] == [True, False]
        and scene.objects[0].kind != scene.objects[1].kind
    )
    kinds = [shape.kind for shape in red.objects]
    assert word_truths(f'a red {kinds[0]} and a red {kinds[1]}', red) == [
        None, True, True, None, None, False, True,
    ]  # fmt: skip
    assert word_truths('three shapes', red)[0] is False and word_truths('a dog', red) == [None, None]


# what visitors ask for


@pytest.mark.parametrize(
    'changes',
    [
        dict(num_beams=1000),
        dict(num_beams='3'),
        dict(num_beams=True),
        dict(temperature=0.0),
        dict(temperature=float('nan')),
        dict(candidates=0),
        dict(strategy='exec'),
        dict(prefix=7),
        dict(bad_words='x' * 201),
        dict(strategy='sample', force_words='red'),
    ],
)
def test_wishes_out_of_bounds_are_refused_in_a_sentence(talk, changes):
    fields = vars(Wishes()) | changes
    (answer,) = [a for a in talk.answer(dict(path=talk.draw()), *fields.values()) if 'class="wrong"' in a]
    assert 10 < len(told(answer)) < 200 and 'role="alert"' in answer


@pytest.mark.parametrize(
    'changes, says',
    [
        (dict(prefix='zzz dog'), 'does not know all words of that beginning'),
        (dict(prefix='red ' * 40), 'too long'),
        (dict(force_words='giraffe'), "'giraffe' is not among the words"),
        (dict(force_words='red', bad_words='red'), 'both asked for and ruled out'),
        (dict(force_words=', '.join(f'{"red " * 5}{n}' for n in ('ring', 'star', 'moon', 'heart', 'cross'))),
         'do not fit'),
    ],
)  # fmt: skip
def test_what_cannot_be_said_is_told_without_names_of_settings(talk, changes, says):
    *_, answer = talk.answer(dict(path=talk.draw()), *(vars(Wishes()) | changes).values())
    assert says in told(answer), told(answer)
    assert '_' not in told(answer)


def test_wishes_come_true(talk):
    fields = vars(Wishes()) | dict(prefix='a red', force_words='moon, left of', bad_words='ring;star')
    *_, answer = talk.answer(dict(path=talk.draw()), *fields.values())
    label = html.unescape(re.search('aria-label="Caption 1: (.*?)\\. Choose', answer)[1])
    assert label.startswith('a red') and 'moon' in label and 'left of' in label
    assert 'ring' not in label.split() and 'star' not in label.split()


def test_errors_end_as_sentences():
    assert plainly(ValueError('no caption.png: damaged')) == 'no caption.png: damaged.'
    assert '\x1b' not in plainly(ValueError('\x1b[31mred'))


# captions and their picture


def test_the_page_says_what_the_command_says(talk, model, drawing, tmp_path):
    (tmp_path / 'a.png').write_bytes(png(drawing))
    *drafts, answer = talk.answer(dict(path=str(tmp_path / 'a.png')), *FIELDS)
    captions = [html.unescape(found) for found in re.findall('"Caption \\d: (.*?)\\. Choose', answer)]
    pixels = photo_pixels((tmp_path / 'a.png').read_bytes(), model)
    assert captions == generate_caption(model, pixels, num_return_sequences=3)[0]
    # the draft is the greedy caption, and grows word by word
    grown = [told(draft).removesuffix('▍').strip() for draft in drafts]
    assert grown[0] == '' and grown[-1] == generate_caption(model, pixels, num_beams=1)[0]
    assert all(after.startswith(before) for before, after in zip(grown, grown[1:])) and len(grown) > 4


@pytest.mark.parametrize('strategy', ['greedy', 'sample'])
def test_the_draft_is_the_first_caption(talk, strategy):
    *_, draft, answer = talk.answer(dict(path=talk.draw()), strategy, 3, 1.0, 4, '', '', '')
    first = html.unescape(re.search('"Caption 1: (.*?)\\. Choose', answer)[1])
    assert told(draft).removesuffix('▍').strip() == first


def test_maps_are_those_of_the_lessons(model, drawing):
    from pvtblip.looking_inside import word_maps

    best = explain(drawing, model).captions[0]
    pixels = photo_pixels(drawing, model)
    ids = generate(model, pixels, num_beams=3).sequences[0, 0]
    tokens, maps = word_maps(model, drawing, ids, pixel_values=pixels)
    # what has no place in the text: an untrained captioner says special tokens too
    said = [i for i, token in enumerate(tokens) if token not in model.tokenizer.tokenizer.all_special_tokens]
    expected = join_words(best.text, [tokens[i] for i in said], maps[said])
    assert [word for word, _ in best.words] == [word for word, _ in expected]
    for (_, ours), (_, theirs) in zip(best.words, expected):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


def test_the_html_loads_nothing_runs_nothing_and_tells_a_screen_reader(model, drawing):
    text = explain(drawing, model).to_html()
    assert not re.search(r'<script|https?:|url\(|\son\w+=', text)
    assert all('alt=' in image for image in re.findall('<img[^>]*>', text))
    best = explain(drawing, model).captions[0].text
    assert f'alt="{html.escape(best)}"' in text and 'role="radiogroup" aria-label="Caption 1: ' in text


def test_what_is_shown_is_escaped(talk, tmp_path):
    (tmp_path / 'x.png').write_bytes(b'GIF?')
    name = '<img src=x onerror=alert(1)>.png'
    (answer,) = talk.answer(dict(path=str(tmp_path / 'x.png'), orig_name=name), *FIELDS)
    assert '<img' not in answer and html.escape(name) in answer


def test_a_wide_and_a_tall_photo_keep_their_shape(model):
    for size in ((900, 30), (30, 900), (1, 1)):
        found = explain(Image.new('RGB', size), model, Wishes(candidates=1))
        assert f'--ratio: {size[0] / size[1]:.4f}' in found.to_html()


def test_a_notebook_gets_a_figure_and_html(model, drawing):
    bundle = explain(drawing, model)._repr_mimebundle_()
    assert bundle['text/plain'] and bundle['text/html'].count('<iframe') == 1
    # what an untrusted notebook leaves of it is the figure
    rest = re.sub('<style.*?</style>|<iframe.*?</iframe>', '', bundle['text/html'], flags=re.S)
    assert rest.count('<img') == 1 and bundle['image/png'] in rest


def test_a_calibrated_model_says_sure_or_not(folder, model, drawing, tmp_path):
    copy = shutil.copytree(folder, tmp_path / 'model')
    plain = explain(drawing, copy)
    assert 'confidence ' in told(plain.to_html()) and plain.captions[0].sure is None
    # right where it is surer than -1, and surer than this model ever is of anything
    confidences = torch.linspace(-3, 0, 400)
    fit_confidence(confidences, confidences > -1).save(copy)
    judged = explain(drawing, copy, sure=0.6)
    assert [spoken.text for spoken in judged.captions] == [spoken.text for spoken in plain.captions]
    spoken = judged.captions[0]
    assert spoken.sure is (torch.tensor(spoken.confidence).log().item() >= -1)
    text = told(judged.to_html())
    assert ('not sure' in text) != spoken.sure and 'right with a probability of' in text


def test_a_drawing_is_known_by_its_file_not_by_its_name(talk, drawing, tmp_path):
    *_, known = talk.answer(dict(path=talk.draw()), *FIELDS)
    assert 'true of this drawing' in told(known)
    (tmp_path / 'drawing-0.png').write_bytes(png(drawing))
    *_, unknown = talk.answer(dict(path=str(tmp_path / 'drawing-0.png')), *FIELDS)
    assert 'true of this drawing' not in told(unknown)


# what visitors send


@pytest.mark.parametrize(
    'content, says',
    [
        (b'\0\0\0\x18ftypheic', 'HEIC, as iPhones write photos; save it as JPEG'),
        (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n', 'PDF, EPS'),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', 'SVG'),
        (b'', 'empty'),
        (b'\x89PNG\r\n\x1a\n' + b'\0' * 40, 'damaged'),
        (b'hello', 'JPEG, PNG'),
    ],
)
def test_a_bad_file_is_told_in_words(talk, tmp_path, content, says):
    (tmp_path / 'holiday.png').write_bytes(content)
    (answer,) = talk.answer(dict(path=str(tmp_path / 'holiday.png'), orig_name='holiday.png'), *FIELDS)
    assert told(answer).startswith('holiday.png: ')
    assert says in told(answer) and str(tmp_path) not in answer and 'Traceback' not in answer


@pytest.mark.parametrize(
    'upload', [{}, [], 'x', dict(path=None), dict(path='/etc/passwd'), dict(path='../../etc/passwd'), dict(path='\0')]
)  # fmt: skip
def test_only_what_was_uploaded_is_opened(tmp_path, upload):
    with pytest.raises(ValueError, match='no longer here'):
        visitors_photo(upload, tmp_path)


def test_a_link_out_of_the_folder_is_not_followed(tmp_path, drawing):
    (tmp_path / 'uploads').mkdir()
    drawing.save(tmp_path / 'private.png')
    (tmp_path / 'uploads/a.png').symlink_to(tmp_path / 'private.png')
    with pytest.raises(ValueError, match='no longer here'):
        visitors_photo(dict(path=str(tmp_path / 'uploads/a.png')), tmp_path / 'uploads')


def test_bytes_and_pixels_are_bounded(tmp_path, monkeypatch, drawing):
    (tmp_path / 'a.png').write_bytes(b'x' * (MOST_BYTES + 1))
    with pytest.raises(ValueError, match='more than 10 MB'):
        visitors_photo(dict(path=str(tmp_path / 'a.png')), tmp_path)
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 90)
    (tmp_path / 'a.png').write_bytes(png(drawing))
    with pytest.raises(ValueError, match='more than 90 pixels'):
        visitors_photo(dict(path=str(tmp_path / 'a.png')), tmp_path)


def test_no_photo_is_no_error(talk):
    (answer,) = talk.answer(None, *FIELDS)
    assert told(answer) == 'The caption will appear here.'


# without a model, without gradio


def test_without_a_model_the_one_in_the_box_speaks(drawing):
    assert len(explain(drawing).captions) == 3


def test_with_an_empty_box_one_line_says_what_to_give(capsys, drawing, tmp_path, monkeypatch):
    monkeypatch.setattr('pvtblip.decoder._BOX', tmp_path)
    with pytest.raises(ValueError, match='no model lies there; give a model folder'):
        explain(drawing)
    code, out, err = pvtblip(capsys, 'app')
    assert code == 1 and err.count('\n') == 1 and 'give a model folder' in err


def test_without_gradio_one_line_says_what_to_install(capsys, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, 'gradio', None)
    code, out, err = pvtblip(capsys, 'app', '--model', folder)
    assert code == 1 and err == "error: the page needs gradio; pip install 'pvtblip[page]'\n"


# over HTTP


@pytest.fixture(scope='module')
def page(folder):
    pytest.importorskip('gradio', reason='the page needs gradio: pip install gradio')
    demo = create_gradio_demo(folder)
    _, address, _ = demo.launch(prevent_thread_lock=True)
    yield demo, address
    demo.close()
    demo.uploads.cleanup()


def asked(address, path='', body=None, **headers):
    "(status, text) of a request."
    request = urllib.request.Request(address + path, body, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, reply.read().decode('utf-8', 'replace')
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode('utf-8', 'replace')


def uploaded(address, content, name='a.png'):
    "Upload as the browser does: (status, text)."
    mark = 'x-mark-x'
    disposition = f'Content-Disposition: form-data; name="files"; filename="{name}"'
    head = f'--{mark}\r\n{disposition}\r\nContent-Type: image/png\r\n\r\n'
    body = head.encode() + content + f'\r\n--{mark}--\r\n'.encode()
    return asked(
        address, 'gradio_api/upload', body, **{'Content-Type': f'multipart/form-data; boundary={mark}'}
    )


def event(demo):
    "Number of the event that captions."
    return next(i for i, fn in demo.fns.items() if getattr(fn.fn, '__name__', '') == 'answer')


def joined(page, path, session, fields=FIELDS):
    "Put a request into the queue: (status, text)."
    demo, address = page
    data = [dict(path=path, orig_name='a.png', meta={'_type': 'gradio.FileData'}), *fields]
    body = json.dumps(dict(data=data, fn_index=event(demo), session_hash=session)).encode()
    return asked(address, 'gradio_api/queue/join', body, **{'Content-Type': 'application/json'})


def heard(page, session):
    "What the queue tells a session: messages, up to the end of its event."
    _, address = page
    found = []
    url = f'{address}gradio_api/queue/data?session_hash={session}'
    with urllib.request.urlopen(url, timeout=120) as stream:
        for line in stream:
            if line.startswith(b'data: '):
                found.append(json.loads(line[6:]))
                if found[-1]['msg'] == 'process_completed':
                    return found


def test_it_listens_here_and_answers_to_its_own_name_only(page):
    _, address = page
    port = address.rsplit(':', 1)[1].strip('/')
    assert address.startswith('http://127.0.0.1:')
    for host, status in (
        (f'127.0.0.1:{port}', 200),
        (f'localhost:{port}', 200),
        (f'evil.example:{port}', 400),
    ):
        assert asked(address, Host=host)[0] == status, host


def test_the_page_names_no_other_place_that_it_would_load_from(page):
    _, text = asked(page[1])
    tags = re.findall('<(?:script|link|img|iframe)[^>]*>', text)
    assert tags and not [tag for tag in tags if re.search('(?:src|href)="(?:https?:)?//', tag)]
    assert 'fonts.googleapis' not in asked(page[1], 'theme.css')[1]


def test_an_upload_over_the_limit_is_refused_and_leaves_nothing(page):
    demo, address = page
    before = sorted(Path(demo.uploads.name).rglob('*'))
    status, text = uploaded(address, b'x' * (MOST_BYTES + 1000))
    assert status == 413 and 'Traceback' not in text
    assert [
        file for file in Path(demo.uploads.name).rglob('*') if file.is_file() and file not in before
    ] == []


def test_the_server_reads_no_file_but_uploads(page):
    assert joined(page, '/etc/passwd', 'thief')[0] == 200
    (*_, last) = heard(page, 'thief')
    assert 'root:' not in json.dumps(last) and 'Traceback' not in json.dumps(last)
    assert asked(page[1], 'gradio_api/file=/etc/passwd')[0] in (403, 404)


def test_the_server_fetches_nothing_for_a_visitor(page):
    asked_for = []

    class Inner(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked_for.append(self.path)
            self.send_error(404)

    with http.server.HTTPServer(('127.0.0.1', 0), Inner) as inner:
        threading.Thread(target=inner.serve_forever, daemon=True).start()
        joined(page, f'http://127.0.0.1:{inner.server_port}/secret.png', 'fetcher')
        (*_, last) = heard(page, 'fetcher')
        inner.shutdown()
    assert not asked_for and 'no longer here' in json.dumps(last)


def test_a_script_in_an_upload_is_not_run_from_our_page(page):
    status, text = uploaded(page[1], b'<script>alert(1)</script>', 'a.html')
    path = json.loads(text)[0]
    request = urllib.request.Request(f'{page[1]}gradio_api/file={path}')
    with urllib.request.urlopen(request, timeout=60) as reply:
        assert 'attachment' in reply.headers.get('Content-Disposition', '')


def test_forty_requests_meet_a_queue_with_an_end(page, drawing):
    "Twenty-odd wait or run, the others are told at once; none hangs, and the page answers after."
    path = json.loads(uploaded(page[1], png(drawing))[1])[0]
    answers = [joined(page, path, f's{i}') for i in range(40)]
    taken = [i for i, (status, _) in enumerate(answers) if status == 200]
    refused = [text for status, text in answers if status == 503]
    assert len(taken) + len(refused) == 40 and 16 <= len(taken) < 40
    assert all('Queue is full' in text for text in refused)
    for i in taken:
        assert heard(page, f's{i}')[-1]['success']
    assert joined(page, path, 'after')[0] == 200 and heard(page, 'after')[-1]['success']


def test_two_visitors_get_each_their_own(page):
    files = [png(Image.fromarray(make_scene(0, i).image)) for i in (1, 2)]
    found = {}

    def visit(name, content, prefix):
        path = json.loads(uploaded(page[1], content)[1])[0]
        joined(page, path, name, ('greedy', 3, 1.0, 1, prefix, '', ''))
        found[name] = json.dumps(heard(page, name)[-1])

    visitors = [
        threading.Thread(target=visit, args=args)
        for args in (('one', files[0], 'a red ring'), ('two', files[1], 'a blue moon'))
    ]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join(60)
    assert 'Caption 1: a red ring' in found['one'] and 'blue moon' not in found['one']
    assert 'Caption 1: a blue moon' in found['two'] and 'red ring' not in found['two']


def test_nothing_stays_when_the_last_page_closes(folder, monkeypatch):
    pytest.importorskip('gradio', reason='the page needs gradio: pip install gradio')
    # as in a program of its own: another test's page may be open
    monkeypatch.setattr(Uploads, 'pages', 0)
    monkeypatch.setattr(Uploads, 'folder', None)
    monkeypatch.setenv('GRADIO_TEMP_DIR', '')
    first, second = create_gradio_demo(folder), create_gradio_demo(folder)
    _, address, _ = first.launch(prevent_thread_lock=True)
    place = Path(first.uploads.name)
    uploaded(address, b'x')
    assert any(place.rglob('*'))
    second.close()
    second.uploads.cleanup()
    uploaded(address, b'x')
    first.close()
    first.uploads.cleanup()
    assert not place.exists()


def test_a_taken_port_is_one_line(page, capsys, folder):
    port = page[1].rsplit(':', 1)[1].strip('/')
    code, out, err = pvtblip(capsys, 'app', '--model', folder, '--port', port)
    assert (
        code == 1
        and err
        == f'error: 127.0.0.1:{port}: cannot be opened (Address already in use); give another --port, or none\n'
    )


def test_the_command_serves_until_it_is_told_to_stop_and_leaves_nothing(folder, tmp_path):
    pytest.importorskip('gradio', reason='the page needs gradio: pip install gradio')
    place = tmp_path / 'tmp'
    place.mkdir()
    command = [sys.executable, '-m', 'pvtblip', 'app', '--model', str(folder)]
    served = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=os.environ | dict(TMPDIR=str(place))
    )
    try:
        line = next(line for line in served.stderr if 'The page is at' in line)
        address = re.search('http://127.0.0.1:[0-9]+/', line)[0]
        assert asked(address)[0] == 200 and uploaded(address, b'x')[0] == 200
        served.send_signal(signal.SIGTERM)
        assert served.wait(30) == 0 and 'Traceback' not in served.stderr.read()
    finally:
        served.kill()
    assert [file for file in place.rglob('*') if 'pvtblip' in file.name] == []


# in a browser


@pytest.fixture(scope='module')
def browser():
    webdriver = pytest.importorskip('selenium.webdriver', reason='needs selenium: pip install selenium')
    driver, chromium = shutil.which('chromedriver'), shutil.which('chromium')
    if not driver or not chromium:
        pytest.skip('needs chromium and chromium-driver of the system')
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        '--headless=new',
        '--no-sandbox',
        '--disable-dev-shm-usage',
        '--force-prefers-reduced-motion',
    ):
        options.add_argument(flag)
    # whatever the page would fetch from elsewhere fails, and is noted
    options.add_argument('--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1')
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL', 'performance': 'ALL'})
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield browser
    browser.quit()


def visit(browser, page, width=1280, height=900):
    "Open the page anew."
    browser.set_window_size(width, height)
    browser.get(page[1])
    return until(browser, '#page-photo input[type=file]')


def until(browser, selector, text='', seconds=120):
    "The first element that fits and holds the text, when it is there."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for element in browser.find_elements('css selector', selector):
            try:
                if text in (element.get_attribute('textContent') or ''):
                    return element
            except Exception as error:  # the page has drawn it anew meanwhile
                if 'stale' not in str(error):
                    raise
        time.sleep(0.05)
    raise AssertionError(
        f'no {selector} with {text!r}: {browser.find_element("css selector", "body").text[-500:]}'
    )


def requests(browser):
    "Addresses that were asked for since the last time."
    events = [json.loads(entry['message'])['message'] for entry in browser.get_log('performance')]
    return [e['params']['request']['url'] for e in events if e['method'] == 'Network.requestWillBeSent']


def given_photo(browser, page, file, **size):
    visit(browser, page, **size).send_keys(str(file))


@pytest.fixture
def photo_file(tmp_path):
    scene = make_scene(0, 3, image_size=400)
    Image.fromarray(scene.image).resize((640, 400)).save(tmp_path / 'photo.jpg')
    return tmp_path / 'photo.jpg'


def test_upload_caption_hover_and_keyboard(browser, page, photo_file):
    from selenium.webdriver import ActionChains, Keys

    given_photo(browser, page, photo_file)
    words = until(browser, '#page-told ol') and browser.find_elements(
        'css selector', '#page-told li:first-child .word'
    )
    assert words and not browser.find_elements('css selector', '#page-told .wrong')
    # hovering shows the map over the photo, and asks nobody
    requests(browser)
    shown = lambda word: float(word.find_element('css selector', '.map').value_of_css_property('opacity'))
    ActionChains(browser).move_to_element(words[0]).perform()
    time.sleep(0.3)
    assert shown(words[0]) > 0.5 and all(shown(word) == 0 for word in words[1:])
    (area, over) = [
        browser.find_element('css selector', selector).rect
        for selector in ('#page-told .photo', '#page-told .word .map')
    ]
    assert all(abs(area[side] - over[side]) < 1.5 for side in ('x', 'y', 'width', 'height')), (area, over)
    # a tap keeps it, the arrow keys go on from word to word
    words[1].click()
    ActionChains(browser).move_to_element(browser.find_element('css selector', 'h1')).perform()
    time.sleep(0.3)
    assert shown(words[1]) > 0.5 and shown(words[0]) == 0
    ActionChains(browser).send_keys(Keys.ARROW_RIGHT).perform()
    time.sleep(0.3)
    assert shown(words[2]) > 0.5 and shown(words[1]) == 0
    assert not [url for url in requests(browser) if not url.startswith('data:') and 'heartbeat' not in url]


def test_words_come_one_by_one(browser, page, photo_file):
    visit(browser, page)
    browser.execute_script(
        'window.seen = []; new MutationObserver(() => {'
        "const d = document.querySelector('#page-told .draft'); if (d) window.seen.push(d.textContent.trim())"
        "}).observe(document.querySelector('#page-told'), {subtree: true, childList: true, characterData: true})"
    )
    browser.find_element('css selector', '#page-photo input[type=file]').send_keys(str(photo_file))
    until(browser, '#page-told ol')
    grown = list(dict.fromkeys(browser.execute_script('return window.seen')))
    assert len(grown) > 3, grown


def test_everything_comes_from_here(browser, page, photo_file):
    requests(browser)
    given_photo(browser, page, photo_file)
    until(browser, '#page-told ol')
    asked_for = [
        url for url in requests(browser) if not url.startswith(('data:', 'blob:', 'chrome', 'about:'))
    ]
    assert len(asked_for) > 20 and not [url for url in asked_for if not url.startswith(page[1])]


@pytest.mark.parametrize(
    'name, content, says',
    [
        ('IMG_1.heic', b'\0\0\0\x18ftypheic' + b'\0' * 99, 'HEIC, as iPhones write photos; save it as JPEG'),
        ('notes.png', b'hello there', 'not an image that can be read'),
        ('${1+1} {{value}}.png', b'hello there', '${1+1} {{value}}.png: not an image'),
    ],
)
def test_a_bad_file_is_told_on_the_page(browser, page, tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    given_photo(browser, page, tmp_path / name)
    wrong = until(browser, '#page-told .wrong')
    assert says in wrong.text and 'Traceback' not in browser.page_source


def test_a_file_too_large_is_told_on_the_page(browser, page, tmp_path):
    (tmp_path / 'large.jpg').write_bytes(b'\xff\xd8\xff' + b'\0' * (MOST_BYTES + 1000))
    given_photo(browser, page, tmp_path / 'large.jpg')
    until(browser, 'body', 'maximum allowed size')


@pytest.mark.parametrize('width', [360, 420, 768, 1280])
def test_nothing_sticks_out_at_any_width(browser, page, photo_file, width):
    given_photo(browser, page, photo_file, width=max(width, 500))
    browser.execute_cdp_cmd(
        'Emulation.setDeviceMetricsOverride',
        dict(width=width, height=900, deviceScaleFactor=1, mobile=width < 500),
    )
    until(browser, '#page-told ol')
    sizes = browser.execute_script('return [document.documentElement.scrollWidth, innerWidth]')
    browser.execute_cdp_cmd('Emulation.clearDeviceMetricsOverride', {})
    assert sizes[0] <= sizes[1], sizes


def test_on_a_phone_the_answer_comes_into_sight(browser, page, photo_file):
    phone = dict(width=390, height=844, deviceScaleFactor=1, mobile=True)
    visit(browser, page)
    browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', phone)
    top = lambda: browser.execute_script(
        "return document.querySelector('#page-told').getBoundingClientRect().top"
    )
    try:
        assert top() > 422
        browser.find_element('css selector', '#page-photo input[type=file]').send_keys(str(photo_file))
        until(browser, '#page-told ol')
        first = browser.find_element('css selector', '#page-told li .word').rect
        scrolled = browser.execute_script('return scrollY')
        assert -20 < top() < 100 and first['y'] + first['height'] < scrolled + 844
        # taking the photo away leaves the page where it is
        browser.execute_script('scrollTo(0, 0)')
        browser.find_element('css selector', '#page-photo .icon-button-wrapper button').click()
        until(browser, '#page-told .note', 'will appear here')
        assert browser.execute_script('return scrollY') == 0
    finally:
        browser.execute_cdp_cmd('Emulation.clearDeviceMetricsOverride', {})


def test_a_drawing_has_true_and_false_words(browser, page):
    visit(browser, page)
    until(browser, 'button', 'Draw shapes').click()
    until(browser, '#page-told .note', 'true of this drawing')
    assert browser.find_elements('css selector', '#page-told .word.true, #page-told .word.false')


def test_a_photo_is_seen_through_the_map_of_a_page():
    _, text = map_uri(torch.tensor([[0.0, 0.2], [0.1, 0.4]]), 0.4).split(',')
    colours = Image.open(io.BytesIO(base64.b64decode(text))).convert('RGBA')
    opacity = [colours.getpixel(place)[3] for place in ((0, 0), (0, 1), (1, 0), (1, 1))]
    assert opacity[0] == 0 and opacity[1:] == [102, 205, 255]
