// The broadcast server on Node.js's net.
const net = require('node:net');

const members = new Set();
let flushIsDue = false;
let news = 0;  // bytes, since the last flush

// Once in a turn of the loop, when all that came in has been read.
function flush() {
  flushIsDue = false;
  news = 0;
  for (const member of members) {
    if (member.queue.length === 0) continue;
    member.socket.write(
        member.queue.length === 1 ? member.queue[0] : Buffer.concat(member.queue));
    member.queue = [];
  }
}

function hear(speaker, bytes) {
  const end = bytes.lastIndexOf(10) + 1;
  if (end === 0) {
    speaker.halfLine.push(bytes);
    return;
  }
  speaker.halfLine.push(bytes.subarray(0, end));
  const lines = speaker.halfLine.length === 1 ? speaker.halfLine[0]
                                              : Buffer.concat(speaker.halfLine);
  speaker.halfLine = end < bytes.length ? [bytes.subarray(end)] : [];
  for (const member of members)
    if (member !== speaker) member.queue.push(lines);
  // Up to 32 reads are heard before it is another one's turn.
  news += lines.length;
  if (news >= 131072) return flush();
  if (!flushIsDue) setImmediate(flush);
  flushIsDue = true;
}

const server = net.createServer({noDelay: true}, (socket) => {
  const member = {socket, queue: [], halfLine: []};
  members.add(member);
  socket.on('data', (bytes) => hear(member, bytes));
  socket.on('error', () => {});
  socket.on('close', () => members.delete(member));
});
server.listen({host: '127.0.0.1', port: 0, backlog: 4096}, () => {
  console.log(`listening on 127.0.0.1:${server.address().port}`);
});
