"""What nbs/tutorial/first_kernel.ipynb shows of JupyterLab, done in a browser: the tile, a kernel on a host, an
interrupt, a kernel that dies, a start that fails. With `GP_SCREENSHOTS=1` the pictures of that page are made anew."""
import os, shutil, signal, sys
import pytest
from playwright.async_api import async_playwright
from conftest import machines_of
from hosts import NetLab, REPO, sh
import matrix

TILE, HOSTS = 'Python SSH', ('laptop', 'fire', 'water')
WHERE = 'import socket\nsocket.gethostname()'
PLOT = 'import matplotlib.pyplot as plt\nplt.figure(figsize=(5, 2))\nplt.plot([n**2 for n in range(10)]);'
ENDLESS = 'import time\nwhile True: time.sleep(1)'

class TwoHosts(NetLab):
    "A machine with JupyterLab, and two hosts, by the names that the tutorial gives them"
    def setup(self, n):
        super().setup(n)
        for h, name in zip(self.hosts, HOSTS): h.name = name
        names = ['127.0.0.1 localhost', '::1 localhost', *(f'{h.address} {h.name}' for h in self.hosts)]
        (self.base/'hosts').write_text('\n'.join(names) + '\n')

class Machines(matrix.Machines):
    "`fire` has the homes of this machine, `water` has none of them; ada can log in to both"
    def __init__(self, client): super().__init__(client, TwoHosts)

    def fresh(self, user):
        super().fresh(user)
        shutil.rmtree(self.home(user)/'.local')
        uid = self.here.users[user]
        (config := self.home(user)/'.ssh/config').write_text('Host water\n    User grace\n')
        os.chown(config, uid, uid)
        install = 'jupyter', 'ssh-spec', 'install', '--user', '--remote-hosts', 'fire,water', '--python', sys.executable
        sh(*self.argv(user, *install), env=self.environ(user))

class Tutorial(matrix.Lab):
    "JupyterLab as the tutorial's reader has it"
    def __init__(self, machines):
        super().__init__(machines, ('JupyterLab', 'direct', 'ada'), [])
        self.machines, self.shots = machines, REPO/'nbs/images'

    async def all(self):
        self.proc = self.start(*self.argv)
        await self.ready()
        async with async_playwright() as p:
            chromium = shutil.which('chromium')
            browser = await p.chromium.launch(executable_path=chromium, headless=True, args=matrix.CHROMIUM)
            try: await self.steps_of_the_page(await browser.new_page(viewport=dict(width=1000, height=560)))
            finally: await browser.close()
        self.proc.terminate()
        await self.ended(self.proc)

    async def shot(self, page, name):
        if matrix.SHOOT: await page.screenshot(path=self.shots/f'tutorial_{name}.png')

    async def steps_of_the_page(self, page):
        page.set_default_timeout(120_000)
        news = page.get_by_role('button', name='No', exact=True)
        await page.add_locator_handler(news, news.click)
        tile = await self.launcher(page, 'first')
        await self.shot(page, 'tile')
        await tile.click()
        await page.locator('.jp-Toolbar-kernelName', has_text=TILE).wait_for()
        await self.idle(page)
        assert await self.enter(page, WHERE) == "'fire'"
        await self.type(page, PLOT)
        await page.locator('.jp-OutputArea img').wait_for()
        await self.idle(page)
        await self.shot(page, 'where')
        await self.interrupted(page)
        await self.killed(page)
        await self.refused(page)

    async def launcher(self, page, workspace):
        "JupyterLab as it opens for the first time; its tile for notebooks on the hosts"
        await page.goto(f'{self.url}/lab/workspaces/{workspace}?token={self.token}')
        tile = page.locator('.jp-LauncherCard[data-category="Notebook"]', has_text=TILE)
        await tile.wait_for()
        return tile

    async def interrupted(self, page):
        await self.type(page, ENDLESS)
        await page.locator('.jp-Notebook-ExecutionIndicator[data-status="busy"]').wait_for()
        await self.menu(page, 'Interrupt Kernel')
        await page.locator('.jp-OutputArea', has_text='KeyboardInterrupt').first.wait_for()
        await self.idle(page)

    async def killed(self, page):
        "A kernel that is killed on its host is said to have died, and is started again"
        pid, = [p.pid for p in self.machines.lab['fire'].kernels()]
        os.kill(pid, signal.SIGKILL)
        died = page.locator('.jp-Dialog', has_text='appears to have died')
        await died.wait_for()
        await self.shot(page, 'died')
        await died.locator('.jp-mod-accept').click()
        assert await self.enter(page, WHERE, again=True) in ("'fire'", "'water'")

    async def refused(self, page):
        "A start that fails says why, in the browser"
        kernel_json = self.machines.home('ada')/'.local/share/jupyter/kernels/ssh_python/kernel.json'
        kernel_json.write_text(kernel_json.read_text().replace(sys.executable, '~/nowhere/bin/python'))
        await (await self.launcher(page, 'second')).click()
        failed = page.locator('.jp-Dialog', has_text='nowhere/bin/python: not found')
        await failed.wait_for()
        await self.shot(page, 'failed')
        await failed.locator('.jp-mod-accept').click()

@pytest.fixture(scope='module')
def machines(client): yield from machines_of(Machines, client)

async def test_the_steps_of_the_tutorial(machines):
    machines.fresh('ada')
    await Tutorial(machines).run()
