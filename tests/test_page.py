"""The page of hosts and kernels, in Chromium: against JupyterLab's server and a Kernel Gateway as users start them,
with kernels on real hosts, some of which are cut off. `GP_SCREENSHOTS=1` makes the pictures of the documentation."""
import asyncio, contextlib, json, os, re, shutil, signal, sys
import pytest
from playwright.async_api import async_playwright, expect
from tornado.httpclient import AsyncHTTPClient, HTTPRequest
from hosts import REPO
from kernels import gone
from pace import Timer, until, within
import matrix

SHARED, FOREIGN = 'node2', 'grace@node3'   # hosts, as the kernelspecs `shared` and `foreign` name them
IMAGES = REPO/'nbs/images'
expect.set_options(timeout=90_000)   # what is promised in time is measured by `within`

class Gateway(matrix.KernelGateway):
    "A Kernel Gateway with the page, and a token, without which it has no users"
    argv, token = ['jupyter', 'kernelgateway', '--api=gateway_provisioners_ssh.extension', '--port=8899'], 'of-tests'
    async def ready(self):
        self.url = 'http://127.0.0.1:8899'
        await self.answers()

@contextlib.asynccontextmanager
async def serving(machines, kind=matrix.Lab, user='ada', prepare=lambda run: None, **env):
    "A server that `user` has started in a fresh home, after `prepare` has run commands there"
    machines.fresh(user)
    app = kind(machines, (kind.__name__, 'direct', user), ())
    app.env |= env
    app.sh = lambda *argv: matrix.sh(*machines.argv(user, *argv), env=app.env)
    with machines.here.ns.entered(), machines.nothing_left():
        prepare(app.sh)
        app.proc = app.start(*app.argv)
        try:
            await app.ready()
            yield app
        except BaseException:
            print(app.text())
            raise
        finally:
            app.proc.terminate()
            try: await app.ended(app.proc)
            finally: app.proc.kill()

EVIL = '<img src=x onerror="window.evil=1"><script>window.evil=1</script>'
INSTALL = 'jupyter', 'ssh-spec', 'install', '--user', '--python', sys.executable
SPECS = dict(both=(f'{FOREIGN},{SHARED}', 'Python on two hosts'), evil=(FOREIGN, EVIL))

@pytest.fixture(scope='module')
def _lab(machines):
    "JupyterLab's server, started by ada in a fresh home with the kernelspecs `shared`, `foreign` and SPECS"
    def prepare(run):
        for k, (hosts, title) in SPECS.items():
            run(*INSTALL, '--kernel-name', k, '--display-name', title, '--remote-hosts', hosts)
    loop, lab = asyncio.new_event_loop(), serving(machines, prepare=prepare)
    try:
        yield loop.run_until_complete(lab.__aenter__())
        loop.run_until_complete(lab.__aexit__(None, None, None))
    finally: loop.close()

@pytest.fixture
async def lab(machines, _lab):
    yield _lab
    for h in machines.nodes: h.heal()
    for o in await _lab.request('GET', 'api/kernels', 200): await end(_lab, o['id'])   # of a test that failed

@contextlib.asynccontextmanager
async def browsing(app, **context):
    "A browser that is logged in, and shows the page; at the end nothing was wrong in it"
    async with async_playwright() as p:
        browser = await p.chromium.launch(executable_path=shutil.which('chromium'), headless=True, args=matrix.CHROMIUM)
        try:
            page = await (await browser.new_context(**dict(viewport=dict(width=1280, height=720)) | context)).new_page()
            page.set_default_timeout(120_000)
            wrong = []
            page.on('pageerror', lambda e: wrong.append(str(e)))
            page.on('console', lambda m: m.type == 'error' and wrong.append(m.text))
            await page.goto(f'{app.url}/ssh-hosts?token={app.token}')
            await expect(page.locator('#stream')).to_have_text('Live')
            yield page
            assert wrong == []
        finally: await browser.close()

def host(page, name): return page.locator(f'[id="host {name}"]')
def kernel(page, name, id): return page.locator(f'[id="kernel {name} {id}"]')
def cell(row, column): return row.locator(f'[data-column={column}]')

async def start(app, spec, **body): return (await app.request('POST', 'api/kernels', 201, name=spec, **body))['id']
async def end(app, id): await app.request('DELETE', f'api/kernels/{id}', 204)
async def pid_of(machines, id):
    return await until(lambda: next((p.pid for h in machines.nodes for p in h.kernels(id)), None), 60)

async def test_rows_follow_kernels(machines, lab):
    async with browsing(lab) as page:
        for o in SHARED, FOREIGN: await expect(cell(host(page, o), 'state')).to_have_text('up')
        await expect(cell(host(page, SHARED), 'memory')).to_contain_text('GiB of')
        await expect(page.locator('#kernel')).to_be_hidden()
        id = await start(lab, 'foreign')
        row = kernel(page, FOREIGN, id)
        await expect(cell(row, 'name').locator('.text')).to_have_text(matrix.TITLES['foreign'])
        await expect(cell(row, 'user')).to_have_text('ada')
        await expect(cell(row, 'memory')).to_contain_text('MiB')
        await expect(cell(host(page, FOREIGN), 'kernels')).to_have_text('1')
        async with lab.channels(id) as c:
            await c.ready()
            await expect(cell(row, 'state')).to_have_text('idle')
            await c.send('kernel_info_request')
            info = await c.wait(lambda m: m['msg_type'] == 'kernel_info_reply')
            assert 'on host node3' in info['content']['banner']   # seen without the page
            msg = await c.start('import os\nos.write(2, b"step 7 of 9\\n")\nwhile True: pass')
            await expect(cell(row, 'state')).to_have_text('busy')
            await expect(cell(row, 'log').locator('summary')).to_have_text('step 7 of 9')
            await lab.request('POST', f'api/kernels/{id}/interrupt', 204)
            assert (await c.reply(msg, 90))['ename'] == 'KeyboardInterrupt'
            await expect(cell(row, 'state')).to_have_text('idle')
            await row.evaluate('o => o.before = true')
            before = await pid_of(machines, id)
            await lab.request('POST', f'api/kernels/{id}/restart', 200)
            await c.ready()
            assert await row.evaluate('o => o.before')   # the row has stayed
            await expect(cell(row, 'log').locator('summary')).not_to_have_text('step 7 of 9')
            os.kill(await pid_of(machines, id), signal.SIGKILL)
            await c.wait(lambda m: m['msg_type'] == 'status' and 'restarting' in m['content']['execution_state'], 90)
            await c.ready()
            assert await pid_of(machines, id) != before
            await expect(cell(row, 'state')).to_have_text('idle')
        await end(lab, id)
        await expect(row).to_have_count(0)
        await expect(page.locator('#kernel')).to_be_hidden()
        await expect(page.locator('#news')).to_contain_text('has gone')

async def test_a_kernel_moves_to_another_host(machines, lab):
    async with browsing(lab) as page:
        id = await start(lab, 'both')
        await expect(kernel(page, FOREIGN, id)).to_have_count(1)
        lab.sh('jupyter', 'ssh-spec', 'drain', FOREIGN)
        await expect(cell(host(page, FOREIGN), 'state').locator('.text')).to_have_text('drained')
        await lab.request('POST', f'api/kernels/{id}/restart', 200)
        await expect(kernel(page, SHARED, id)).to_have_count(1)
        await expect(kernel(page, FOREIGN, id)).to_have_count(0)
        lab.sh('jupyter', 'ssh-spec', 'undrain', FOREIGN)
        await expect(cell(host(page, FOREIGN), 'state').locator('.text')).to_have_text('up')
        await end(lab, id)

async def test_a_host_that_is_cut_off(machines, lab):
    async with browsing(lab) as page:
        id = await start(lab, 'foreign')
        state, row = cell(host(page, FOREIGN), 'state').locator('.text'), kernel(page, FOREIGN, id)
        await expect(row).to_have_count(1)
        async def seen():
            machines.foreign.heal()
            await expect(state).to_have_text('up')
            machines.foreign.cut()
            t = Timer()
            await expect(state).not_to_have_text('up')
            return float(t)
        await within(15, seen)
        assert await state.inner_text() in ('does not answer', 'down')
        await expect(cell(row, 'state')).to_have_text('out of reach')
        await expect(state).to_have_text('down')
        await expect(cell(host(page, FOREIGN), 'state').locator('small')).to_contain_text('no answer from')
        await expect(cell(host(page, SHARED), 'state')).to_have_text('up')
        machines.foreign.heal()
        await expect(state).to_have_text('up')
        await expect(cell(row, 'state')).to_have_text(re.compile('idle|running|starting'))
        await end(lab, id)
        await expect(row).to_have_count(0)

async def test_stop_and_restart_ask_first(machines, lab):
    async with browsing(lab) as page:
        id = await start(lab, 'foreign')
        row, dialog = kernel(page, FOREIGN, id), page.locator('#ask')
        pid = await pid_of(machines, id)
        stop = page.get_by_role('button', name=f'Stop kernel {matrix.TITLES["foreign"]} on {FOREIGN}')
        for leave in 'Enter', 'Escape':   # by keyboard; what has the focus in the dialog is Cancel
            await stop.focus()
            await page.keyboard.press('Enter')
            await expect(page.get_by_role('dialog', name='Stop this kernel?')).to_be_visible()
            await expect(dialog.get_by_role('button', name='Cancel')).to_be_focused()
            await page.keyboard.press(leave)
            await expect(dialog).to_be_hidden()
            await expect(stop).to_be_focused()
        assert not gone(pid)
        await row.get_by_role('button', name='Restart').click()
        await dialog.get_by_role('button', name='Restart').click()
        await expect(page.locator('#news')).to_contain_text('was restarted')
        assert gone(pid) and (await lab.request('GET', f'api/kernels/{id}', 200))['id'] == id
        await stop.focus()
        before = await cell(row, 'age').inner_text()
        await expect(cell(row, 'age')).not_to_have_text(before)   # the row has been brought up to date meanwhile
        await expect(stop).to_be_focused()
        await page.keyboard.press('Space')
        await page.keyboard.press('Tab')
        await page.keyboard.press('Enter')
        await expect(row).to_have_count(0)
        await expect(page.locator('#kernels-title')).to_be_focused()   # not lost with the row
        await lab.request('GET', f'api/kernels/{id}', 404)

OTHER = '''import sys, time
from jupyter_client.manager import start_new_kernel
spec, user, code = sys.argv[1:]
km, kc = start_new_kernel(kernel_name=spec, env=dict(KERNEL_USERNAME=user), startup_timeout=120)
print(km.provisioner.kernel_id, flush=True)
kc.execute(code)
while km.is_alive(): time.sleep(.1)
print('ended', flush=True)
km.cleanup_resources()
'''

async def other_application(machines, lab, page, spec, user, code=''):
    "A kernel that a script of ada's has started: its row, and a coroutine that ends it by the page"
    (lab.work/'other.py').write_text(OTHER)
    p = lab.start(sys.executable, 'other.py', spec, user, code)
    id = (await until(lambda: p.log.read_text().split(), 120))[0]
    row = kernel(page, FOREIGN, id)
    async def stop():
        await row.get_by_role('button').click()
        await page.locator('#ask-yes').click()
        await expect(row).to_have_count(0)
        await lab.ended(p)
        assert p.log.read_text().split() == [id, 'ended']
        (machines.foreign.tmp/f'kernel-{id}.log').unlink()   # it stays, as its application had not asked for the end
    return row, stop

async def test_a_kernel_of_another_application(machines, lab):
    async with browsing(lab) as page:
        row, stop = await other_application(machines, lab, page, 'foreign', 'bob')
        await expect(cell(row, 'user')).to_have_text('bob')
        await expect(cell(row, 'state')).to_contain_text('of other.py on node1')
        assert await row.get_by_role('button').all_inner_texts() == ['Stop']
        await stop()

async def fetch(app, path, method='GET', body=None, **headers):
    request = HTTPRequest(f'{app.url}/{path}', method, headers, body=body, follow_redirects=False, request_timeout=60)
    return await AsyncHTTPClient().fetch(request, raise_error=False)

async def test_only_for_those_who_are_logged_in(machines, lab):
    for path in 'ssh-hosts', 'ssh-hosts/page.js', 'ssh-hosts/page.css', 'ssh-hosts/events':
        r = await fetch(lab, path)
        assert (r.code, 'Location' in r.headers) == (403, False), path
    assert b'not logged in' in (await fetch(lab, 'ssh-hosts')).body
    assert await ordered(lab) == await ordered(lab, Authorization='token wrong') == 403
    assert await ordered(lab, **lab.headers) == 404
    assert await ordered(lab, order='[]', **lab.headers) == 400
    page = await fetch(lab, f'ssh-hosts?token={lab.token}')
    policy = page.headers['Content-Security-Policy']
    assert page.code == 200 and "default-src 'none'" in policy and 'unsafe' not in policy
    await xsrf(lab, page)

STOP = json.dumps(dict(action='stop', host=FOREIGN, id='none'))   # there is no such kernel, which a status of 404 says
async def ordered(app, query='', order=STOP, **headers):
    return (await fetch(app, f'ssh-hosts/kernels{query}', 'POST', order, **headers)).code

async def xsrf(app, page):
    "A cookie alone, which a browser sends with the request of any site, changes nothing"
    cookie = '; '.join(o.partition(';')[0] for o in page.headers.get_list('Set-Cookie'))
    token = re.search(rb'data-xsrf="([^"]+)"', page.body)[1].decode()
    assert (await fetch(app, 'ssh-hosts', Cookie=cookie)).code == 200
    assert await ordered(app, Cookie=cookie) == await ordered(app, '?token=wrong', Cookie=cookie) == 403
    assert await ordered(app, **{'Cookie': cookie, 'X-XSRFToken': token}) == 404

async def test_markup_of_others_is_text(machines, lab):
    async with browsing(lab) as page:
        code = f'import os; os.write(2, {(EVIL + chr(10)).encode()})'
        row, stop = await other_application(machines, lab, page, 'evil', EVIL, code)
        await expect(cell(row, 'name').locator('.text')).to_have_text(EVIL)
        await expect(cell(row, 'user')).to_have_text(EVIL)
        await expect(cell(row, 'log').locator('summary')).to_have_text(EVIL)
        await row.get_by_role('button', name='Stop').click()
        await expect(page.locator('#ask-text')).to_contain_text(EVIL)
        await page.keyboard.press('Escape')
        await stop()
        await expect(page.locator('#news')).to_contain_text(EVIL)
        assert await page.evaluate('window.evil') is None and await page.locator('img, main script').count() == 0

async def test_notebooks_by_name_and_the_server_gone(machines, lab):
    async with browsing(lab) as page:
        session = dict(name='', path='squares.ipynb', type='notebook', kernel=dict(name='shared'))
        made = await fetch(lab, 'api/sessions', 'POST', json.dumps(session), **lab.headers)
        id = json.loads(made.body)['kernel']['id']
        await expect(cell(kernel(page, SHARED, id), 'name').locator('.text')).to_have_text('squares.ipynb')
        await page.evaluate('stream.dispatchEvent(new Event("error"))')
        await expect(page.locator('#stream')).to_contain_text('trying again')
        await end(lab, id)
        await expect(kernel(page, SHARED, id)).to_have_count(0)

async def test_kernel_gateway_serves_it(machines):
    async with serving(machines, Gateway, 'root', KG_AUTH_TOKEN=Gateway.token) as gateway:
        for o in 'ssh-hosts', 'ssh-hosts/page.js', 'ssh-hosts/events': assert (await fetch(gateway, o)).code == 403
        await xsrf(gateway, await fetch(gateway, f'ssh-hosts?token={gateway.token}'))
        async with browsing(gateway) as page:
            assert 'token' not in page.url
            id = await start(gateway, 'foreign', env=dict(KERNEL_USERNAME='grace'))
            row = kernel(page, FOREIGN, id)
            await expect(cell(row, 'user')).to_have_text('grace')
            async with gateway.channels(id) as c:
                await c.ready()
                await expect(cell(row, 'state')).to_have_text('idle')
            for action, done in (('Restart', 'was restarted'), ('Stop', 'has')):
                await row.get_by_role('button', name=action).click()
                await page.locator('#ask-yes').click()
                await expect(page.locator('#news')).to_contain_text(done)
            await expect(row).to_have_count(0)

async def test_what_is_missing_is_said(machines):
    def prepare(run): run('sh', '-c', 'echo "raise ImportError(\'No module named paramiko\')" > ~/work/paramiko.py')
    class Below(matrix.Lab): argv = ['jupyter', 'lab', '--no-browser', '--allow-root', '--ServerApp.base_url=/team/']
    async with serving(machines, Below, 'root', prepare, PYTHONPATH='/root/work') as lab, browsing(lab) as page:
        assert page.url.endswith('/team/ssh-hosts')
        await expect(page.get_by_role('alert')).to_contain_text('lacks a package')
        await expect(page.get_by_role('alert')).to_contain_text('-m pip install paramiko')

# Pictures for the documentation

def aliases(machines):
    "An OpenSSH configuration with names for readers: fire, water, and earth, where nothing answers"
    at = dict(fire=('node2', 'root'), water=('node3', 'grace'), earth=(machines.lab.addr(99), 'ada'))
    return ''.join(f'Host {k}\n    HostName {name}\n    User {user}\n' for k, (name, user) in at.items())

def tiles(machines):
    def prepare(run):
        home = machines.home('root')
        (home/'.ssh/config').write_text(aliases(machines))
        for k in matrix.ENTRIES: shutil.rmtree(home/'.local/share/jupyter/kernels'/k)
        run(*INSTALL, '--display-name', 'Python SSH', '--remote-hosts', 'fire,water,earth', '--tile-per-host')
    return prepare

WORK = dict(weather=('fire', 'for year in range(1990, 2020): os.write(2, b"year %d\\n" % year)\nwhile True: pass'),
            glaciers=('fire', ''), tides=('water', 'os.write(2, b"12 stations read\\n")'))

async def notebook(lab, name, host, code):
    "A notebook whose kernel runs on `host` and has begun with `code`; the kernel's id"
    session = dict(name='', path=f'{name}.ipynb', type='notebook', kernel=dict(name=f'ssh_python_{host}'))
    made = await fetch(lab, 'api/sessions', 'POST', json.dumps(session), **lab.headers)
    id = json.loads(made.body)['kernel']['id']
    async with lab.channels(id) as c:
        await c.ready()
        await c.start(f'import os\n{code}')
    return id

async def shoot_launcher(lab, page):
    await page.goto(f'{lab.url}/lab')
    news = page.get_by_role('button', name='No', exact=True)
    await page.add_locator_handler(news, news.click)
    await page.locator('.jp-LauncherCard[data-category="Notebook"]').nth(3).wait_for()
    await page.locator('.jp-Launcher-section').first.screenshot(path=IMAGES/'launcher_tiles.png')
    await page.goto('about:blank')

@pytest.mark.skipif(not matrix.SHOOT, reason='GP_SCREENSHOTS=1 makes pictures')
async def test_pictures(machines):
    async with serving(machines, matrix.Lab, 'root', tiles(machines), KERNEL_USERNAME='ada') as lab:
        ids = {k: await notebook(lab, k, *o) for k, o in WORK.items()}
        lab.sh('jupyter', 'ssh-spec', 'drain', 'water')
        for name, scheme, width in ('ssh_hosts', 'light', 1280), ('ssh_hosts_phone', 'dark', 420):
            async with browsing(lab, color_scheme=scheme, viewport=dict(width=width, height=560)) as page:
                await expect(cell(host(page, 'earth'), 'state').locator('.text')).to_have_text('down')
                last = cell(kernel(page, 'water', ids['tides']), 'log').locator('summary')
                await expect(last).to_have_text('12 stations read')
                await expect(cell(kernel(page, 'fire', ids['weather']), 'state')).to_have_text('busy')
                await page.screenshot(path=IMAGES/f'{name}.png', full_page=True)
                if name == 'ssh_hosts': await shoot_launcher(lab, page)
        lab.sh('jupyter', 'ssh-spec', 'undrain', 'water')
        for o in ids.values(): await end(lab, o)
