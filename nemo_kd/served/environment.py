"""The environment variables that decide how a server is reached: proxies and certificates."""

from __future__ import annotations

import os
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import httpx

SCHEMES = ("http", "https", "all")
CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR")  # httpx reads the first that is set


def proxy_of(url: str) -> str:
    """Return the variable that names the proxy to `url`, such as `HTTP_PROXY`; "" without one."""
    parts, proxies = urlsplit(url), getproxies()
    if proxy_bypass(parts.hostname or "", proxies):
        return ""
    given = (scheme for scheme in (parts.scheme, "all") if proxies.get(scheme))
    return _variable(next(given, ""))


def fault_of(error: Exception) -> str:
    """Describe in one line the variable with which httpx cannot be used, given its error."""
    if isinstance(error, OSError):  # also of ssl
        name = next((name for name in CERTIFICATES if os.environ.get(name)), CERTIFICATES[0])
        return (
            f"the environment variable {name}={os.environ.get(name, '')} has no readable "
            f"certificates ({error}): correct or unset it"
        )
    for scheme in SCHEMES:
        name = _variable(scheme)
        if name and (wrong := _wrong_proxy(os.environ[name])):
            return f"the environment variable {name} is no usable proxy ({wrong}): {REMEDY}"
    name = _variable("no")
    return f"the environment variable {name or 'NO_PROXY'} cannot be read ({error}): {HOSTS}"


REMEDY = "set it to http://HOST:PORT or unset it; NO_PROXY=HOST reaches one server without a proxy"
HOSTS = "set it to hosts, separated by commas, or unset it"


def _wrong_proxy(address: str) -> str:
    """Return why httpx does not accept a proxy; "" if it does. Without a password in it."""
    scheme = address.partition("://")[0] if "://" in address else "http"
    if scheme.startswith("socks"):
        return f"{scheme} needs the package socksio"
    try:
        httpx.Proxy(address if "://" in address else f"http://{address}")
    except (ValueError, httpx.InvalidURL) as error:
        return str(error).replace(address, f"{scheme}://...")
    return ""


def _variable(scheme: str) -> str:
    """Return the name of a set variable `scheme`_proxy; the one in lower case counts first."""
    lower = f"{scheme}_proxy"
    names = (lower, lower.upper())
    return next((name for name in names if scheme and os.environ.get(name)), "")
