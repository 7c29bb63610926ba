"""The option that names a model of a Docker or OCI registry, under llama-server's name."""

from typing import Any, Final

import click

from llamaherd.pool import BadRequest, parse_docker_name

__all__ = ["DOCKER_OPTION"]


class _DockerName(click.ParamType[str]):
    """A name as llama-server takes it, such as ``smollm2`` or ``ai/smollm2:135M-Q4_0``, or one with its registry."""

    name = "name"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value:
            try:
                parse_docker_name(value)
            except BadRequest as error:
                self.fail(str(error), param, ctx)
        return str(value)


DOCKER_OPTION: Final = click.option(
    "-dr",
    "--docker-repo",
    "docker_repo",
    type=_DockerName(),
    default="",
    metavar="NAME",
    envvar="LLAMA_ARG_DOCKER_REPO",
    help="A model of a Docker or OCI registry to offer, [<registry>/][<user>/]<model>[:<tag>], downloaded at the start "
    "if it is not in the cache. By default of docker.io, of the user ai and with the tag latest.",
)
