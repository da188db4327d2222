"""docs/drills.json, and the tables made of it in docs/drills.md and docs/drills.zh-CN.md.

python -m tests.drills.rows        # renew the tables
"""

from __future__ import annotations

import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

FILE = Path("docs/drills.json")
BEGIN, END = "<!-- made by make drills: begin -->", "<!-- made by make drills: end -->"

DOCUMENTS = {Path("docs/drills.md"): "en", Path("docs/drills.zh-CN.md"): "zh"}
HEADS = {
    "en": (
        "drill",
        "etcd",
        "seconds",
        "packets sent / lost",
        "changes written / told / twice",
        "agent's CPU, % of a core, before → in the drill",
        "its memory, MB, before → after",
        "well again after, s",
        "longest without a write, s",
        "also",
    ),
    "zh": (
        "演练",
        "etcd",
        "时长(秒)",
        "发包 / 丢包",
        "变更写入 / 收到 / 重复",
        "agent CPU(单核 %),演练前 → 演练中",
        "agent 内存(MB),前 → 后",
        "恢复用时(秒)",
        "最长无法写入(秒)",
        "其他",
    ),
}

NOTES = {
    "ready_seconds": ("restarted agents READY after {:.1f} s", "重启的 agent {:.1f} 秒后 READY"),
    "leases_back_seconds": ("all leases back {:.1f} s after etcd was", "etcd 恢复 {:.1f} 秒后租约全部回归"),
    "lists": ("{:.0f} lists, each whole", "列表 {:.0f} 次,每次完整"),
    "list_seconds_before": ("a list took {:.1f} s before", "故障前每次列表 {:.1f} 秒"),
    "list_seconds_longest": ("{:.1f} s at the most", "最长 {:.1f} 秒"),
    "renewals": ("{:.0f} renewals each", "各续约 {:.0f} 次"),
}
"""What a drill may have measured besides (`Measured.note`)."""

TITLES = {
    "leader-killed": ("leader killed", "杀死 leader"),
    "leader-killed-grpc": (
        "leader killed; no JSON gateway, all by gRPC",
        "杀死 leader;JSON 网关关闭,全部走 gRPC",
    ),
    "follower-killed": ("followers killed, one after the other", "依次杀死各 follower"),
    "member-frozen": ("each member frozen (SIGSTOP)", "依次冻结各成员(SIGSTOP)"),
    "quorum-lost": ("quorum lost for a minute", "失去多数派一分钟"),
    "all-down": ("all down for 5 minutes, every agent restarted", "全部停机 5 分钟,期间重启每个 agent"),
    "data-lost": ("all data lost, etcd empty again", "数据全部丢失,etcd 变空"),
    "compacted": ("compacted while hosts are cut off", "主机与 etcd 断开期间发生压缩(compaction)"),
    "slow-member": (
        "slow follower, then slow leader (150 ms each way)",
        "follower 变慢,随后 leader 变慢(单程 150 ms)",
    ),
    "addresses-changed": (
        "all members replaced on new addresses, found by name",
        "所有成员逐个换到新地址(按主机名访问)",
    ),
    "list-during-failover": ("20,000 leases listed while the leader dies", "leader 被杀时列出 20,000 个租约"),
    "nospace-alarm": ("NOSPACE alarm: etcd takes no writes", "NOSPACE 告警:etcd 拒绝写入"),
    "quota-used-up": (
        "quota used up; then compacted, defragmented, disarmed",
        "配额用尽;随后压缩、碎片整理、解除告警",
    ),
    "disk-full": (
        "file systems of two members full, the leader's first: both end",
        "两个成员(先 leader)的文件系统写满,成员退出",
    ),
    "auth-on": ("logins switched on and off", "开启再关闭登录认证"),
    "token-expiry": ("tokens end between uses", "令牌在两次使用之间过期"),
    "certificates-rotated": ("all certificates and the CA replaced", "更换全部证书和 CA"),
    "v2-and-v3": ("v2 and v3 both hold a network, all members down", "v2 与 v3 各有一个网络,全部成员宕机"),
}
"""Each drill's name in the tables, English and Chinese, in the order of the rows."""


def keep(row: dict[str, Any]) -> None:
    """Put a row where that of the drill and etcd ("3.4", "3.4 v2", "3.7") stood."""
    row = {**row, "when": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), **_conditions()}
    order = list(TITLES)
    rows = [*_without(row["drill"], row["etcd"]), row]
    rows.sort(key=lambda one: (order.index(one["drill"]), one["etcd"]))
    _write(rows)


def drop(drill: str, etcd: str) -> None:
    """What was measured once says nothing of a drill that begins anew, and may fail."""
    _write(_without(drill, etcd))


def _without(drill: str, etcd: str) -> list[dict[str, Any]]:
    return [one for one in _read() if (one["drill"], one["etcd"]) != (drill, etcd)]


def _write(rows: list[dict[str, Any]]) -> None:
    FILE.write_text(json.dumps({"schema": 1, "rows": rows}, indent=1) + "\n")


def _read() -> list[dict[str, Any]]:
    return json.loads(FILE.read_text())["rows"] if FILE.exists() else []


def _conditions() -> dict[str, Any]:
    return {
        "kernel": platform.release(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "agents": "frozen" if "FLANCTL_EXE" in os.environ else "venv",
    }


def render(rows: list[dict[str, Any]], language: str) -> str:
    """The table: one row per drill and version, every number as it was measured."""
    heads, tongue = HEADS[language], ("en", "zh").index(language)
    lines = [*_caption(rows, tongue), f"| {' | '.join(heads)} |"]
    lines.append("| --- | --- |" + " ---: |" * (len(heads) - 3) + " --- |")
    for row in rows:
        packets, events, agent = row["packets"], row["events"], row["agent"]
        recover = row["recover_seconds"]
        cells = [
            TITLES[row["drill"]][tongue],
            row["etcd"],
            f"{row['seconds']:.0f}",
            f"{packets['sent']:,} / {packets['lost']}",
            f"{events['written']:,} / {events['seen']:,} / {events['doubled']}",
            f"{agent['cpu_percent_before']:.1f} → {agent['cpu_percent']:.1f}",
            f"{agent['rss_before_mb']:.1f} → {agent['rss_after_mb']:.1f}",
            "-" if recover is None else f"{recover:.1f}",
            f"{row['writer_longest_pause_seconds']:.1f}",
            ", ".join(words[tongue].format(row[name]) for name, words in NOTES.items() if name in row),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _caption(rows: list[dict[str, Any]], tongue: int) -> list[str]:
    """When and where; nothing if nothing was measured yet."""
    if not rows:
        return []

    def all_of(name: str) -> str:
        return ", ".join(sorted({str(row[name]) for row in rows}))

    days = sorted(row["when"][:10] for row in rows)
    when = days[0] if days[0] == days[-1] else f"{days[0]} – {days[-1]}"
    kernel, cores, python = all_of("kernel"), all_of("cores"), all_of("python")
    frozen = {row["agents"] for row in rows} == {"frozen"}
    return [
        (
            f"Measured {when} on Linux {kernel}, {cores} cores for all of it, "
            + (
                "agents from the one file."
                if frozen
                else f"agents from the source tree with Python {python}."
            ),
            f"{when} 实测于 Linux {kernel},全部进程共用 {cores} 核,"
            + ("agent 为单文件版本。" if frozen else f"agent 从源码目录运行(Python {python})。"),
        )[tongue],
        "",
    ]


def renew(document: Path, language: str) -> None:
    """Put the table between its marks; the words around it stay."""
    before, rest = document.read_text().split(BEGIN)
    document.write_text(f"{before}{BEGIN}\n{render(_read(), language)}{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    for path, language in DOCUMENTS.items():
        renew(path, language)
