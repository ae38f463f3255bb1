"""A local page that shows a server's tokens in the colours of their experts, as they stream.

`routes.py` knows the server's models and their routes, `server.py` serves the page and what it asks
for, `page.html` is the page.
"""
