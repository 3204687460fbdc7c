"""Examples in the help of commands that have none in their own text: what people type most, as it works."""

from __future__ import annotations

EXAMPLES: dict[str, tuple[str, ...]] = {
    "down": ("whaleflux down", "whaleflux down --state /srv/whaleflux"),
    "demo": ("whaleflux demo", "whaleflux demo --keep        leaves everything running, to look around"),
    "agent": ("WHALEFLUX_JOIN_TOKEN=... whaleflux agent --server HOST:7443 --ca-file ca.crt --site onprem",),
    "status": ("whaleflux status", "whaleflux status -o json"),
    "sites": ("whaleflux sites", "whaleflux sites -o name"),
    "cordon": ('whaleflux cordon onprem/n7 -m "fan is loud"',),
    "uncordon": ("whaleflux uncordon onprem/n7",),
    "retire": ('whaleflux retire onprem/n7 -m "sold" --yes',),
    "job": ("whaleflux job llama-70b-sft", "whaleflux job research/sft-2 -o json"),
    "checkpoints": ("whaleflux checkpoints llama-70b-sft", "whaleflux checkpoints --sort -step -o wide"),
    "cancel": ('whaleflux cancel llama-70b-sft -m "wrong data"', "whaleflux cancel research/sft-2 --yes"),
    "release": ("whaleflux release llama-70b-sft",),
    "delete": ("whaleflux delete llama-70b-sft --yes",),
    "queues": ("whaleflux queues", "whaleflux queues -o csv"),
    "models": ("whaleflux models", "whaleflux models -o json"),
    "replicas": ("whaleflux replicas", "whaleflux replicas llama-8b -o wide"),
    "route": ("whaleflux route llama-8b --prompt-tokens 4000",),
    "unserve": ("whaleflux unserve llama-8b --yes",),
    "logout": ("whaleflux logout", "whaleflux --context prod logout --yes"),
    "whoami": ("whaleflux whoami", "whaleflux whoami -o json"),
    "user ls": ("whaleflux user ls", "whaleflux user ls -o json"),
    "user show": ("whaleflux user show ann",),
    "user enable": ("whaleflux user enable ann",),
    "group add": ("whaleflux group add research ann",),
    "group remove": ("whaleflux group remove research ann",),
    "group rm": ("whaleflux group rm research --yes",),
    "group ls": ("whaleflux group ls",),
    "tokens ls": ("whaleflux tokens ls", "whaleflux tokens ls --user ci"),
    "tokens rm": ("whaleflux tokens rm ID --yes",),
    "version": ("whaleflux version", "whaleflux --version        of this program alone, without asking the fleet"),
    "config list": ("whaleflux config list",),
    "config use": ("whaleflux config use prod",),
    "config remove": ("whaleflux config remove prod",),
    "keys create": ("whaleflux keys create chatbot --days 90",),
    "keys list": ("whaleflux keys list",),
    "keys delete": ("whaleflux keys delete apiKeys/ID --yes",),
    "datasets ls": ("whaleflux datasets ls",),
    "datasets show": ("whaleflux datasets show c4",),
    "datasets rm": ("whaleflux datasets rm c4 --yes",),
    "queue ls": ("whaleflux queue ls",),
    "queue rm": ("whaleflux queue rm research",),
    "reservation ls": ("whaleflux reservation ls", "whaleflux reservation ls -a -o wide"),
    "reservation show": ("whaleflux reservation show launch", "whaleflux reservation show launch -o json"),
    "reservation rm": ("whaleflux reservation rm launch --yes",),
    "secrets ls": ("whaleflux secrets ls", "whaleflux secrets ls -o json"),
    "secrets show": ("whaleflux secrets show hf-token",),
    "secrets rm": ("whaleflux secrets rm hf-token --yes",),
    "token create": ("whaleflux token create --site onprem", "whaleflux token create --site edge --node n7 --ttl 30m"),
    "token list": ("whaleflux token list",),
    "token delete": ("whaleflux token delete joinTokens/ID",),
}


def epilog(command: str) -> str | None:
    """The examples of a command ("keys create" of one in a group), laid out as they stand; None where there are none."""
    lines = EXAMPLES.get(command, ())
    return "\b\n" + "\n".join(f"  {line}" for line in lines) if lines else None
