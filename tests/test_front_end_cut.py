"""A page of JupyterLab shows all that a cell printed while its host was out of reach: in a tunnel, in Chromium, in a
fresh home."""
import asyncio, re
from pace import Deadline, until
import matrix

LINES = 200
COUNT = f'''import time
for i in range({LINES}): print(f"<{{i}}>", "x"*500, flush=True); time.sleep(.1)
open("/tmp/counted", "w").close()'''

class CutPage(matrix.Lab):
    "JupyterLab with a kernel on a host that is cut off while a cell prints"
    def __init__(self, machines): super().__init__(machines, ('JupyterLab', 'tunnel', 'ada'), ['shared'])

    async def one(self, place, step):
        page = await self.open(await self.context.new_page(), place)
        await self.idle(page)
        pid = step.check(await self.enter(page, matrix.WHERE))
        host = self.machines.node(place)
        out = page.locator('.jp-OutputArea-output').nth(await page.locator('.jp-OutputArea-output').count())
        async def shown(): return [int(o) for o in re.findall(r'<(\d+)>', await out.inner_text())]
        async def showing(n):
            "The lines that are shown, once there are `n`"
            deadline = Deadline(60)
            while len(lines := await shown()) < n:
                assert not deadline.passed(), f'{len(lines)} of {n} lines are shown'
                await asyncio.sleep(.05)
            return lines
        await self.type(page, COUNT)
        await out.wait_for()
        await showing(20)
        host.cut()
        try:
            counted = host.tmp/'counted'
            await until(counted.exists, 60, 'the end of the cell')
            counted.unlink()
            assert len(await shown()) < LINES
        finally: host.heal()
        assert await showing(LINES) == list(range(LINES))
        assert (await self.enter(page, 'print(i)')).strip() == f'{LINES-1}'
        self.pids = pid,

async def test_a_page_shows_what_was_printed_during_a_cut(machines):
    machines.fresh('ada')
    await CutPage(machines).run()
