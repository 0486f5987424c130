"""Who looks at the pages of a coordinator, over HTTP as a browser asks for them."""

from __future__ import annotations

import re
import urllib.error
import urllib.request

from tests.report.reader import Element, parsed


class Browser:
    """Asks for pages with the key from the coordinator's folder, or without one."""

    def __init__(self, link: str) -> None:
        [(self.key, self.address)] = re.findall(r"http://fedkit:([^@]+)@([^/]+)/runs\n", link)

    def get(self, path: str, *, key: str | None = None, method: str = "GET") -> tuple[int, str, dict[str, str]]:
        request = urllib.request.Request(f"http://{self.address}{path}", method=method)
        if key is not None:
            manager = urllib.request.HTTPPasswordMgrWithPriorAuth()
            manager.add_password(None, request.full_url, "fedkit", key, is_authenticated=True)
            handlers = [urllib.request.HTTPBasicAuthHandler(manager)]
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), *(handlers if key is not None else []))
        try:
            with opener.open(request, timeout=30) as reply:
                return reply.status, reply.read().decode(), dict(reply.headers)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode(), dict(error.headers)

    def page(self, path: str) -> Element:
        status, html, _ = self.get(path, key=self.key)
        assert status == 200, html
        return parsed(html)
