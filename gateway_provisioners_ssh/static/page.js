// The page of hosts and kernels. One stream brings what has changed; rows are changed in place, so that focus, selection and open logs stay.
// Whatever comes from hosts, users and kernels becomes text, never markup.
'use strict'
const $ = id => document.getElementById(id)
const tables = { host: $('host'), kernel: $('kernel') }
const rows = new Map() // by key: { tr, cells, data }

function element(tag, attributes = {}, ...children) {
  const made = Object.assign(document.createElement(tag), attributes)
  made.append(...children)
  return made
}

function setText(node, text) { if (node.textContent !== text) node.textContent = text }

function duration(seconds) {
  if (seconds === null) return '?'
  const [unit, length] = [['d', 86400], ['h', 3600], ['min', 60], ['s', 1]].find(o => seconds >= 2 * o[1]) || ['s', 1]
  return `${Math.floor(seconds / length)} ${unit}`
}

// Cells: what is made once for a column, and how it shows the data of a row. Any other column is plain text.

function amount(cell) { // a text, and the same as a bar
  const text = element('span'), bar = element('meter', { min: 0, max: 1, low: 0.7, high: 0.9, optimum: 0 })
  bar.setAttribute('aria-hidden', 'true')
  cell.append(text, bar)
  return ([words, part]) => { cell.classList.toggle('empty', !words); setText(text, words); bar.hidden = part === null; bar.value = part ?? 0 }
}

function titled(cell) { // a text, with a note below
  const text = element('span', { className: 'text' }), note = element('small')
  cell.append(text, note)
  return ([words, more]) => { setText(text, words); setText(note, more); note.hidden = !more }
}

function log(cell) { // the last line; the last lines when it is opened
  const last = element('summary'), all = element('pre', { tabIndex: 0 })
  const details = element('details', {}, last, all)
  cell.append(details)
  return lines => { setText(last, lines.at(-1) || ''); setText(all, lines.join('\n')); details.hidden = !lines.length }
}

function actions(cell, key) {
  return wanted => {
    for (const o of [...cell.children]) if (!wanted.includes(o.value)) o.remove()
    for (const o of wanted) {
      if ([...cell.children].some(b => b.value === o)) continue
      const button = element('button', { type: 'button', value: o }, o === 'stop' ? 'Stop' : 'Restart')
      button.setAttribute('aria-label', `${button.textContent} kernel ${rows.get(key).data.title}`)
      button.addEventListener('click', () => act(o, key, button))
      cell.append(button)
    }
  }
}

const makers = { load: amount, memory: amount, name: titled, state: titled, log, actions,
  age: cell => seconds => setText(cell, duration(seconds)) }

function makeRow(key, data) {
  const row = { tr: element('tr', { id: key }), cells: {}, data: {} }
  row.tr.setAttribute('role', 'row')
  rows.set(key, row)
  for (const head of tables[data.kind].tHead.rows[0].cells) {
    const name = head.dataset.column, first = name === 'name', cell = element(first ? 'th' : 'td', first ? { scope: 'row' } : {})
    cell.setAttribute('role', first ? 'rowheader' : 'cell')
    cell.dataset.column = name
    cell.dataset.label = head.textContent
    row.tr.append(cell)
    row.cells[name] = makers[name] && !(data.kind === 'kernel' && name === 'memory') ? makers[name](cell, key) : text => setText(cell, text)
  }
  return row
}

function update(key, data) {
  const row = rows.get(key) || makeRow(key, data), old = row.data
  row.data = data
  row.tr.dataset.state = data.tone
  for (const [name, show] of Object.entries(row.cells))
    if (JSON.stringify(old[name]) !== JSON.stringify(data[name])) show(data[name])
}

function remove(key) {
  const row = rows.get(key), table = tables[row.data.kind]
  const hadFocus = row.tr.contains(document.activeElement)
  row.tr.remove()
  rows.delete(key)
  if (hadFocus) $(table.getAttribute('aria-labelledby')).focus()
}

function arrange(order) { // moves rows only where they are out of order, and gives back the focus that a move takes
  const focused = document.activeElement
  for (const [kind, table] of Object.entries(tables)) {
    const wanted = order.filter(k => rows.get(k).data.kind === kind).map(k => rows.get(k).tr), body = table.tBodies[0]
    wanted.forEach((tr, i) => { if (body.rows[i] !== tr) body.insertBefore(tr, body.rows[i] || null) })
    table.hidden = !wanted.length
    table.parentElement.querySelector('.none').hidden = wanted.length > 0
  }
  if (focused !== document.activeElement && focused.isConnected) focused.focus()
}

// The stream

function say(text) { setText($('news'), text) }

function announce(before, order) { // for screen readers: what came, went, or changed its state
  const title = key => (before.get(key) || rows.get(key)?.data).title
  const words = [...before.keys()].filter(k => !rows.has(k)).map(k => `${title(k)} has gone`)
  for (const k of order) {
    const data = rows.get(k).data, old = before.get(k)
    if (!old) words.push(`${title(k)} is new`)
    else if (data.kind === 'host' && old.state[0] !== data.state[0]) words.push(`${title(k)}: ${data.state[0]}`)
  }
  if (words.length) say(words.slice(0, 5).join('; ') + (words.length > 5 ? ` and ${words.length - 5} more changes` : ''))
}

let order = [], first = true
function receive(event) {
  const m = JSON.parse(event.data), before = new Map([...rows].map(([k, o]) => [k, o.data]))
  order = m.order || order
  for (const [key, data] of Object.entries(m.rows)) update(key, data)
  for (const key of [...rows.keys()]) if (!order.includes(key)) remove(key)
  arrange(order)
  setText($('problem'), m.problem)
  $('problem').hidden = !m.problem
  if (!first) announce(before, order)
  first = false
}

const stream = new EventSource('ssh-hosts/events')
stream.onopen = () => { setText($('stream'), 'Live'); document.body.classList.remove('stale') }
stream.onerror = () => { setText($('stream'), 'The server cannot be reached; trying again…'); document.body.classList.add('stale') }
stream.onmessage = receive

// What people do

function ask(title, text, yes) {
  const dialog = $('ask')
  setText($('ask-title'), title); setText($('ask-text'), text); setText($('ask-yes'), yes)
  dialog.returnValue = ''
  dialog.showModal()
  return new Promise(done => dialog.addEventListener('close', () => done(dialog.returnValue === 'yes'), { once: true }))
}
for (const button of $('ask').querySelectorAll('button')) button.addEventListener('click', () => $('ask').close(button.value))

async function act(action, key, button) {
  const { id, host, title } = rows.get(key).data, word = action === 'stop' ? 'Stop' : 'Restart'
  if (button.ariaBusy === 'true' || !await ask(`${word} this kernel?`, `${title}: all its variables are lost.`, word)) return
  button.ariaBusy = 'true'
  say(`${title} is asked to ${action}…`)
  try {
    const answer = await fetch('ssh-hosts/kernels', { method: 'POST', body: JSON.stringify({ action, id, host }),
      headers: { 'Content-Type': 'application/json', 'X-XSRFToken': document.body.dataset.xsrf } })
    if (!answer.ok) throw new Error((await answer.json().catch(() => ({}))).message || `status ${answer.status}`)
    say(`${title} ${action === 'stop' ? 'has ended' : 'was restarted'}`)
  } catch (e) { say(`${title} could not ${action}: ${e.message}`) }
  finally { button.ariaBusy = 'false' }
}

if (new URLSearchParams(location.search).has('token')) history.replaceState(null, '', location.pathname)
