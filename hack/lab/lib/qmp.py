"""Sends QMP commands over a socket: qmp.py SOCKET '{"execute": ...}'... ; prints each answer as a line."""
import json
import socket
import sys

sock = socket.socket(socket.AF_UNIX)
sock.settimeout(20)
sock.connect(sys.argv[1])
stream = sock.makefile("rw")


def ask(command):
    stream.write(command + "\n")
    stream.flush()
    for line in stream:
        answer = json.loads(line)
        if "return" in answer or "error" in answer:  # the rest are events
            return answer
    sys.exit("qmp: QEMU closed the connection")


stream.readline()  # the greeting
ask('{"execute": "qmp_capabilities"}')
for command in sys.argv[2:]:
    answer = ask(command)
    if "error" in answer:
        sys.exit(f"qmp: {command}: {answer['error']['desc']}")
    result = answer["return"]
    print(result if isinstance(result, str) else json.dumps(result))
