"""A real server of S3's interface on 127.0.0.1, moto's, behind a gate that breaks chosen requests in chosen ways.

    with S3Server() as s3:
        s3.put_tree('bucket/name', folder)
        s3.fail('GET .*shard-00001', 'cut', times=2)
        ...                                # with s3.environment, which is what users of S3 set
"""

import re
import socket
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import boto3
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server

from support.files import tree

SECRET = 'TheSecretKeyOfTheTests0123456789'
ERRORS = {'403': 'AccessDenied', '500': 'InternalError', '501': 'NotImplemented', '503': 'SlowDown'}


@dataclass
class Fault:
    pattern: str
    how: str
    times: float
    seconds: float = 0.


@dataclass
class S3Server:
    """The server; a context manager.

    Attributes:
        requests: Method, path and query of every request, and the status of its answer.
    """
    faults: list[Fault] = field(default_factory=list)
    requests: list[tuple[str, str]] = field(default_factory=list)

    def __enter__(self) -> 'S3Server':
        self.lock = threading.Lock()
        self.app = DomainDispatcherApplication(create_backend_app)
        handler = type('Handler', (MotoRequestHandler,), {'log': lambda *_: None})
        self.server = make_server('127.0.0.1', 0, self.answer, threaded=True, request_handler=handler)
        self.endpoint = f'http://127.0.0.1:{self.server.server_port}'
        self.environment = {
            'AWS_ENDPOINT_URL': self.endpoint, 'AWS_ACCESS_KEY_ID': 'TESTS', 'AWS_SECRET_ACCESS_KEY': SECRET,
            'AWS_DEFAULT_REGION': 'us-east-1', 'AWS_MAX_ATTEMPTS': '1', 'AWS_EC2_METADATA_DISABLED': 'true',
            'AWS_CONFIG_FILE': '/dev/null', 'AWS_SHARED_CREDENTIALS_FILE': '/dev/null'}
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.client = boto3.client(
            's3', endpoint_url=self.endpoint, aws_access_key_id='TESTS', aws_secret_access_key=SECRET,
            region_name='us-east-1')
        for name in ('bucket', 'my-bucket'):  # of the tests, and of the documentation
            self.client.create_bucket(Bucket=name)
        return self

    def __exit__(self, *_) -> None:
        self.client.close()
        self.server.shutdown()

    def fail(self, pattern: str, how: str, times: float = 1, seconds: float = 0.) -> None:
        """Break the next requests that match a pattern: with a status, `cut`, `wrong-bytes`, `slow` or `silent`."""
        self.faults.append(Fault(pattern, how, times, seconds))

    def forget(self) -> None:
        """Break nothing more, and know of no request."""
        self.faults.clear()
        self.requests.clear()

    def seen(self, pattern: str, status: str = '') -> list[str]:
        return [line for line, answered in self.requests if re.match(pattern, line) and answered.startswith(status)]

    def put_tree(self, name: str, folder: Path, leave_out: str = '-') -> None:
        for path, data in tree(folder, hidden=False).items():
            if not re.match(leave_out, path):
                self.client.put_object(Bucket='bucket', Key=f'{name}/{path}', Body=data)

    def tree(self, name: str) -> dict[str, bytes]:
        """Names and contents of all objects of a folder."""
        pages = self.client.get_paginator('list_objects_v2').paginate(Bucket='bucket', Prefix=f'{name}/')
        keys = [item['Key'] for page in pages for item in page.get('Contents', [])]
        return {key.removeprefix(f'{name}/'): self.client.get_object(Bucket='bucket', Key=key)['Body'].read()
                for key in keys}

    def answer(self, environ, start_response):
        """The gate: WSGI before moto's."""
        line = f'{environ["REQUEST_METHOD"]} {environ["PATH_INFO"]}?{environ["QUERY_STRING"]}'
        with self.lock:
            fault = next((fault for fault in self.faults if fault.times > 0 and re.match(fault.pattern, line)), None)
            if fault:
                fault.times -= 1
        how = fault.how if fault else ''
        if how == 'slow':
            time.sleep(fault.seconds)
        if how in ERRORS:
            environ['wsgi.input'].read(int(environ.get('CONTENT_LENGTH') or 0))
            body = f'<Error><Code>{ERRORS[how]}</Code><Message>By the tests</Message></Error>'.encode()
            if environ['REQUEST_METHOD'] == 'HEAD':
                body = b''
            self.requests.append((line, how))
            start_response(f'{how} Broken', [('Content-Type', 'text/xml'), ('Content-Length', str(len(body)))])
            return [body]
        answered = []
        body = b''.join(self.app(environ, lambda status, headers, *_: answered.extend((status, headers))))
        status, headers = answered
        self.requests.append((line, status))
        if how == 'wrong-bytes':
            middle = len(body) // 2
            body = body[:middle] + bytes(byte ^ 0x55 for byte in body[middle:middle + 8]) + body[middle + 8:]
            headers = [pair for pair in headers if not pair[0].lower().startswith('x-amz-checksum')]
        start_response(status, headers)
        if how == 'cut':
            # Less than was announced; of a change all that was asked for is done, and nobody hears of it.
            if environ['REQUEST_METHOD'] == 'GET':
                return [body[:len(body) // 2]]
            environ['werkzeug.socket'].shutdown(socket.SHUT_RDWR)
            raise ConnectionAbortedError
        if how == 'silent':
            raise ConnectionAbortedError  # werkzeug keeps the connection, and says nothing
        return [body]
