"""The web application: Gradio, routes for audio, and headers that forbid remote resources."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any

from trl_drcd.app import listen as listen_tab
from trl_drcd.app import pages
from trl_drcd.app import rate as rate_tab
from trl_drcd.app.arguments import AppArguments
from trl_drcd.app.media import Media
from trl_drcd.compat.extras import require
from trl_drcd.ratings.store import CLIPS_FOLDER, Study

if TYPE_CHECKING:
    from trl_drcd.app.engine import Engine

LOOPBACK = ("127.0.0.1", "localhost", "::1")
# Gradio's page needs inline scripts and styles; everything else must come from this server
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self' https://huggingface.co"
)
SYSTEM_FONTS, SYSTEM_MONO = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]
# The Base theme's own colours have a contrast below 4.5:1
CONTRAST = {
    "button_primary_background_fill": "*primary_700",
    "button_primary_background_fill_hover": "*primary_800",
    "button_primary_background_fill_dark": "*primary_700",
    "button_primary_background_fill_hover_dark": "*primary_800",
    "body_text_color_subdued": "*neutral_500",
    "input_placeholder_color": "*neutral_600",
    "input_placeholder_color_dark": "*neutral_300",
}
Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]


def gradio() -> Any:
    """Import Gradio with telemetry off."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    return require("gradio", "app")


class Headers:
    """Adds security headers to every response; plain ASGI middleware, since responses may be streams."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Send) -> None:
        """Handle an ASGI connection."""

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                new = {
                    b"content-security-policy": POLICY.encode(),
                    b"x-content-type-options": b"nosniff",
                    b"referrer-policy": b"same-origin",  # personal links are secret
                }
                kept = [(name, value) for name, value in message["headers"] if name.lower() not in new]
                message["headers"] = [*kept, *new.items()]
            await send(message)

        await self.app(scope, receive, with_headers)


def make_app(args: AppArguments, engine: Engine | None = None, sync: Any = None) -> Any:
    """
    Create the application.

    Args:
        args ([`AppArguments`]): Arguments of the app.
        engine ([`Engine`], *optional*): The models, if they are already loaded.
        sync (*optional*): Copies ratings elsewhere after each one; see [`Rate`].

    Returns:
        `fastapi.FastAPI`: The application with the tabs of `args`, for uvicorn.

    Raises:
        FileNotFoundError, ImportError, ValueError: If a model, evaluation, study or library of a tab is missing.
    """
    gr, fastapi = gradio(), require("fastapi", "app")
    app, media = fastapi.FastAPI(openapi_url=None), Media()
    listen = listen_tab.Listen(str(args.evaluation)) if "listen" in args.tabs else None
    rate = rate_tab.Rate(Study(str(args.study)), sync) if "rate" in args.tabs else None
    if "play" in args.tabs:  # imported only then, since it loads a model
        from trl_drcd.app import play as play_tab
        from trl_drcd.app.engine import Engine

        play = play_tab.Play(engine or Engine(args), media)
    with gr.Blocks(title="trl-drcd", analytics_enabled=False, fill_width=True) as blocks, gr.Tabs():
        if "play" in args.tabs:
            with gr.Tab("Play", id="play"):
                play_tab.build(gr, blocks, play)
        if listen is not None:
            with gr.Tab("Listen", id="listen"):
                listen_tab.build(gr, listen)
        if rate is not None:
            with gr.Tab("Rate", id="rate"):
                rate_tab.build(gr, blocks, rate)
    _add_media(app, media)
    if listen is not None:
        static = require("fastapi.staticfiles", "app")
        app.mount("/samples", static.StaticFiles(directory=listen.folder / "samples"))
    if rate is not None:
        _add_clips(app, rate.study)
    app.add_middleware(Headers)
    if args.host in LOOPBACK:  # against DNS rebinding: a remote page could reach this server by its own name
        trusted = require("starlette.middleware.trustedhost", "app")
        # Of `[::1]:7860` Starlette reads the address, or in some versions the bracket alone, with which no name begins
        allowed = [*LOOPBACK, "[::1]", "[", "testserver"]
        app.add_middleware(trusted.TrustedHostMiddleware, allowed_hosts=allowed)
    blocks.queue(max_size=64)
    theme = gr.themes.Base(font=SYSTEM_FONTS, font_mono=SYSTEM_MONO).set(**CONTRAST)
    return gr.mount_gradio_app(
        app, blocks, path="/", server_name=args.host, server_port=args.port, ssr_mode=False, show_error=False,
        max_file_size="1kb", footer_links=[], theme=theme, css=pages.asset("app.css"),
        head=f"<script>{pages.asset('rate.js')}</script>",
    )  # fmt: skip


def _add_media(app: Any, media: Media) -> None:
    responses = require("fastapi.responses", "app")

    @app.get("/media/{name}")
    def get_media(name: str) -> Any:
        found = media.get(name)
        return (
            responses.Response(status_code=404) if found is None else responses.Response(found[0], media_type=found[1])
        )


def _add_clips(app: Any, study: Study) -> None:
    """Routes for a rater's clips, by place instead of name, and for recording which were played."""
    responses = require("fastapi.responses", "app")

    @app.get("/rate/clip/{link}/{slot}/{place}")
    def get_clip(link: str, slot: int, place: str) -> Any:
        try:
            name = study.task(link, slot).clip(place)
        except ValueError:
            name = None
        if name is None:
            return responses.Response(status_code=404)
        return responses.FileResponse(study.folder / CLIPS_FOLDER / name, headers={"cache-control": "private"})

    @app.post("/rate/played/{link}/{slot}/{place}")
    def played(link: str, slot: int, place: str) -> Any:
        try:
            study.mark_played(link, slot, place)
        except ValueError:
            return responses.Response(status_code=404)
        return responses.Response(status_code=204)


def serve(args: AppArguments) -> None:
    """Serve until interrupted."""
    print("Loading ...", flush=True)
    sync = None
    if args.sync_to and "rate" in args.tabs:
        from trl_drcd.ratings.sync import Sync

        sync = Sync(Study(str(args.study)), args.sync_to)
    app = make_app(args, sync=sync)
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(args.host, f"[{args.host}]" if ":" in args.host else args.host)
    print(f"Open http://{host}:{args.port}   (end with Ctrl-C)")
    # Ctrl-C would wait forever for the connection of an open page; every rating is already on disk
    require("uvicorn", "app").run(
        app, host=args.host, port=args.port, log_level="warning", timeout_graceful_shutdown=3
    )
