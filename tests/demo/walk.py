"""The steps of the demo. Each says what it does, shows what happened and checks it against what a Service promises."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable

from tests.demo.report import Report
from tests.lab.cluster import Cluster, Node, Pod
from tests.lab.cluster_objects import external_name, headless, load_balancer, port, service
from tests.lab.traffic import NoAnswer, Stream, answered, fails_as, settle, try_once, who_answers

PICTURE = """\
kproxy demo: a cluster of three nodes on this machine, in network namespaces; nothing outside them is touched.

        outside client 203.0.113.10
                 │
     ────────────┴──── 172.30.0.0/24 ── API server ──
        │               │               │
     node-1 .11      node-2 .12      node-3 .13      a kproxy process on each
      pods            pods            pods           10.244.<node>.0/24"""

NGINX, HTTPD = "Welcome to nginx!", "It works!"
CLUSTER_IP, NODE_PORT = "10.96.0.10", 30007
STICKY_IP, SHOP_IP, LOAD_BALANCER_IP, EMPTY_IP = "10.96.0.20", "10.96.0.30", "198.51.100.10", "10.96.0.40"
CONNECTIONS = 200


class Walk:
    """The demo on one cluster. The steps build on each other."""

    def __init__(self, cluster: Cluster, report: Report) -> None:
        self.cluster, self.report = cluster, report
        self.one, self.two, self.three = cluster.nodes
        self.visitor = cluster.run_pod("visitor", self.three, tcp=())
        self.pods: list[Pod] = []
        self.url = f"http://{CLUSTER_IP}/"

    def steps(self) -> tuple[Callable[[], None], ...]:
        """All steps, in order."""
        return (
            self.look_before_and_after,
            self.share_the_load,
            self.answer_on_every_node,
            self.follow_a_pod,
            self.respect_readiness,
            self.scale,
            self.keep_a_client,
            self.guard_a_load_balancer,
            self.leave_out_what_has_no_address,
            self.refuse_at_once,
            self.survive_a_crash,
        )

    @property
    def possible(self) -> bool:
        """Whether there is a kproxy on every node, without which nothing more can be shown."""
        return all(node.proxy is not None and node.proxy.running for node in self.cluster.nodes)

    def look_before_and_after(self) -> None:
        """`--dry-run` before anything is programmed and after."""
        say = self.report
        with say.step("kproxy --dry-run tells what it would do; then kproxy does it"):
            nginx = self._pod("nginx", self.one, NGINX)
            httpd = self._pod("httpd", self.two, HTTPD)
            say.does(f"Pods {nginx} on {nginx.node} and {httpd} on {httpd.node} carry the label app=hello.")
            say.does(f"Service hello selects them: ClusterIP {CLUSTER_IP}, port 80, and node port {NODE_PORT}.")
            self._hello()
            say.does(f"`kproxy --dry-run` on {self.one}, where no kproxy has run yet:")
            lines = self._dry_run()
            interesting = [line for line in lines if CLUSTER_IP in line or str(NODE_PORT) in line]
            say.saw("\n".join([lines[0], *interesting[:6], f"… {len(lines)} lines in all"]))
            untouched = not self.one.exec("nft", "list", "ruleset")
            say.holds(untouched and bool(interesting), "it names the Service's addresses and has changed nothing")

            begin = time.monotonic()
            self.cluster.start_proxies()
            seconds = time.monotonic() - begin
            say.does("kproxy is started on all three nodes, then `kproxy --dry-run` again:")
            after = self._dry_run()[0]
            say.saw(after)
            finding = f"{lines[0].partition(': ')[2]}; after the start: {after.partition(': ')[2]}"
            say.holds("nothing to change" in after, f"all three were in step after {seconds:.1f} s", finding=finding)

    def share_the_load(self) -> None:
        """Two pods behind one ClusterIP."""
        say = self.report
        with say.step("One address, two pods: the ClusterIP shares connections out"):
            say.does(f"{CONNECTIONS} connections from pod {self.visitor} on {self.three} to {self.url}:")
            texts = Counter(self.visitor.get(self.url).text.strip() for _ in range(CONNECTIONS))
            for text, count in sorted(texts.items()):
                say.saw(f"{text:20} {count:4}  {_percent(count)}")
            fair = set(texts) == {NGINX, HTTPD} and all(0.3 <= n / CONNECTIONS <= 0.7 for n in texts.values())
            finding = " / ".join(f"{text} {_percent(count)}" for text, count in sorted(texts.items()))
            say.holds(fair, "each pod answers about half of them", finding=finding)
            say.does(f"`kproxy explain {self.visitor.ipv4} {CLUSTER_IP}:80` on {self.three} tells why:")
            told = self._kproxy(self.three, "explain", self.visitor.ipv4, f"{CLUSTER_IP}:80")
            say.saw("\n".join(told))
            say.holds(all(any(pod.ipv4 in line for line in told) for pod in self.pods), "it names the same two pods")
            answer = self.visitor.get(self.url)
            say.holds(answer.client == self.visitor.ipv4, f"the pod sees its real client, {answer.client}")

    def answer_on_every_node(self) -> None:
        """The node port, from outside."""
        say = self.report
        with say.step(f"The node port {NODE_PORT} answers on every node, with a pod or without"):
            both = True
            for node in self.cluster.nodes:
                url = f"http://{node.ipv4}:{NODE_PORT}/"
                seen = who_answers(self.cluster.client, url, 30)
                here = [pod.name for pod in self.pods if pod.node is node]
                say.saw(f"client → {url:27} {_spread(seen)}   (pods on {node}: {', '.join(here) or 'none'})")
                both &= set(seen) == {"nginx", "httpd"}
            say.holds(both, "the outside client reaches both pods through each of the three nodes")
            within = who_answers(self.three, f"http://{self.three.ipv4}:{NODE_PORT}/", 20)
            finding = "3 nodes, both pods through each"
            say.holds(set(within) == {"nginx", "httpd"}, "and so does a program on a node itself", finding=finding)

    def follow_a_pod(self) -> None:
        """A pod dies and is replaced on another node."""
        say = self.report
        with say.step("A pod dies and comes back elsewhere; the traffic follows"):
            httpd = self._named("httpd")
            say.does(f"{httpd} ({httpd.ipv4}, {httpd.node}) dies.")
            self._remove(httpd)
            gone = settle(self.visitor, self.url, {"nginx"})
            say.saw(f"after {gone * 1000:.0f} ms new connections are answered by nginx alone")
            again = self._pod("httpd", self.three, HTTPD)
            say.does(f"It comes back as {again} ({again.ipv4}) on {again.node}.")
            back = settle(self.visitor, self.url, {"nginx", "httpd"})
            say.saw(f"after {back * 1000:.0f} ms they are answered by both")
            finding = f"away in {gone * 1000:.0f} ms, back in {back * 1000:.0f} ms"
            say.holds(gone < 2 and back < 2, "both changes are in force within two seconds", finding=finding)

    def respect_readiness(self) -> None:
        """A readiness probe fails and recovers."""
        say = self.report
        with say.step("A pod that is not ready gets no new connections"):
            nginx = self._named("nginx")
            say.does(f"The readiness probe of {nginx} fails; its server still runs.")
            self.cluster.set_ready(nginx, False)
            out = settle(self.visitor, self.url, {"httpd"})
            seen = who_answers(self.visitor, self.url, 50)
            say.saw(f"50 connections: {_spread(seen)}")
            say.holds(set(seen) == {"httpd"}, f"{nginx} is left alone after {out * 1000:.0f} ms")
            say.does("The probe succeeds again.")
            self.cluster.set_ready(nginx, True)
            back = settle(self.visitor, self.url, {"nginx", "httpd"})
            finding = f"out in {out * 1000:.0f} ms, back in {back * 1000:.0f} ms"
            say.holds(True, f"{nginx} takes part again after {back * 1000:.0f} ms", finding=finding)

    def scale(self) -> None:
        """3, 5, 2 replicas."""
        say = self.report
        with say.step("Scaling: 3, then 5, then 2 pods"):
            shares = []
            for replicas in (3, 5, 2):
                while len(self.pods) > replicas:
                    self._remove(self.pods[-1])
                while len(self.pods) < replicas:
                    number = len(self.pods) + 1
                    node = self.cluster.nodes[number % 3]
                    self._pod(f"hello-{number}", node, f"Hello from number {number}.")
                settle(self.visitor, self.url, {pod.name for pod in self.pods})
                seen = who_answers(self.visitor, self.url, CONNECTIONS)
                say.saw(f"{replicas} pods: {_spread(seen)}")
                wide = CONNECTIONS / replicas
                shares.append(len(seen) == replicas and all(0.4 * wide <= n <= 1.7 * wide for n in seen.values()))
            finding = f"{CONNECTIONS} connections spread evenly each time"
            say.holds(all(shares), "every pod there is gets its share, and no other", finding=finding)

    def keep_a_client(self) -> None:
        """Session affinity."""
        say = self.report
        with say.step("Session affinity keeps a client on one pod"):
            say.does(f"Service sticky, ClusterIP {STICKY_IP}, selects the same pods with sessionAffinity: ClientIP.")
            timeout = {"clientIP": {"timeoutSeconds": 10800}}
            spec = {"sessionAffinity": "ClientIP", "sessionAffinityConfig": timeout}
            self.cluster.apply(service("sticky", STICKY_IP, app="hello", **spec))
            url = f"http://{STICKY_IP}/"
            answered(self.visitor, url)
            seen = who_answers(self.visitor, url, 50)
            say.saw(f"50 connections from {self.visitor}: {_spread(seen)}")
            say.holds(len(seen) == 1, "all go to one pod")
            (chosen,) = seen
            say.does(f"{chosen} stops being ready.")
            self.cluster.set_ready(self._named(chosen), False)
            (other,) = {pod.name for pod in self.pods} - {chosen}
            moved = settle(self.visitor, url, {other})
            finding = f"50 of 50 to {chosen}; moved to {other} in {moved * 1000:.0f} ms when that went"
            say.holds(True, f"the client moves to {other} after {moved * 1000:.0f} ms and stays", finding=finding)
            self.cluster.set_ready(self._named(chosen), True)
            settle(self.visitor, self.url, {chosen, other})

    def guard_a_load_balancer(self) -> None:
        """A load balancer's address with source ranges."""
        say = self.report
        with say.step("A load balancer's address, open to chosen sources only"):
            client = self.cluster.client
            say.does(
                f"Service shop: type LoadBalancer; a cloud gave it {LOAD_BALANCER_IP}, which is routed to {self.two}."
            )
            self.cluster.route_from_outside(LOAD_BALANCER_IP, self.two)
            url = f"http://{LOAD_BALANCER_IP}/"
            self.cluster.apply(load_balancer("shop", SHOP_IP, LOAD_BALANCER_IP, app="hello"))
            answered(client, url)
            say.saw(f"open to all:          client {client.ipv4} → {url}  {_spread(who_answers(client, url, 20))}")
            held = []
            for ranges, how in (["192.0.2.0/24"], "silence"), (["192.0.2.0/24", "203.0.113.0/24"], "answered"):
                closed = load_balancer("shop", SHOP_IP, LOAD_BALANCER_IP, app="hello", loadBalancerSourceRanges=ranges)
                self.cluster.apply(closed)
                if how == "silence":
                    fails_as(client, url, NoAnswer.SILENCE)
                else:
                    answered(client, url)
                outcome = try_once(client, url)
                held.append((outcome is NoAnswer.SILENCE) == (how == "silence"))
                told = "dropped: no answer" if outcome is NoAnswer.SILENCE else f"answered by {outcome}"
                say.saw(f"open to {' and '.join(ranges)}: {told}")
            say.holds(
                all(held), "source ranges are obeyed, and changing them takes effect", finding="closed, then open"
            )
            inside = who_answers(self.visitor, f"http://{SHOP_IP}/", 10)
            say.holds(bool(inside), f"its ClusterIP {SHOP_IP} is not concerned: {_spread(inside)}")

    def leave_out_what_has_no_address(self) -> None:
        """Headless and ExternalName Services."""
        say = self.report
        with say.step("Headless and ExternalName Services are DNS only: they leave no rule"):
            before = self._rules(self.one)
            say.does("Services peers (clusterIP: None) and mail (ExternalName: mail.example.org) are created,")
            say.does("and after them one with an address, to know when kproxy has seen all three.")
            marker = "10.96.0.99"
            self.cluster.apply(headless("peers", app="hello"), external_name("mail", "mail.example.org"))
            self.cluster.apply(service("marker", marker, app="hello"))
            settle(self.one, f"http://{marker}/", {pod.name for pod in self.pods})
            added = self._rules(self.one) - before
            foreign = [rule for rule in added.elements() if marker not in rule]
            say.saw(f"on {self.one}: {added.total()} more map elements, all of them for {marker}")
            say.holds(not foreign and bool(added), "nothing else is in the kernel", finding="0 map elements for both")
            for name in ("marker", "peers", "mail"):
                self.cluster.delete_service(name)

    def refuse_at_once(self) -> None:
        """A Service without endpoints."""
        say = self.report
        with say.step("A Service that selects nothing refuses at once, instead of letting clients wait"):
            say.does(f"Service empty, ClusterIP {EMPTY_IP}, selects app=nobody.")
            self.cluster.apply(service("empty", EMPTY_IP, app="nobody"))
            url = f"http://{EMPTY_IP}/"
            slowest = 0.0
            for host in (self.visitor, self.one):
                fails_as(host, url, NoAnswer.REFUSED)
                begin = time.monotonic()
                outcome = try_once(host, url)
                slowest = max(slowest, time.monotonic() - begin)
                say.saw(f"from {host}: {outcome.value if isinstance(outcome, NoAnswer) else outcome}")
            say.holds(slowest < 0.5, f"refused after {slowest * 1000:.1f} ms", finding=f"{slowest * 1000:.1f} ms")

    def survive_a_crash(self) -> None:
        """kproxy is killed under traffic and started again."""
        say = self.report
        with say.step("kproxy dies; the traffic does not notice"):
            proxy = self.three.proxy
            assert proxy is not None
            with Stream(self.visitor, self.url) as stream:
                stream.more(100)
                say.does(
                    f"kproxy on {self.three} is killed (SIGKILL) while {self.visitor} opens connections, then started."
                )
                proxy.stop(9)
                stream.more(300)
                proxy.start()
                proxy.wait_until_synced()
                stream.more(100)
            finding = f"{stream.connections} connections, {len(stream.failures)} failed"
            say.saw("\n".join([f"{finding}, the slowest took {stream.slowest * 1000:.0f} ms", *stream.failures]))
            say.holds(not stream.failures, "not one connection failed", finding=finding)

    def _hello(self) -> None:
        ports = [port(80, node_port=NODE_PORT)]
        self.cluster.apply(service("hello", CLUSTER_IP, type="NodePort", ports=ports))

    def _dry_run(self) -> list[str]:
        return self._kproxy(self.one, "--dry-run")

    def _kproxy(self, node: Node, *arguments: str) -> list[str]:
        done = self.cluster.kproxy(node, *arguments)
        if not done.stdout:
            raise AssertionError(f"kproxy {arguments[0]} ended with {done.returncode}: {done.stderr.splitlines()[-1:]}")
        return done.stdout.splitlines()

    def _pod(self, name: str, node: Node, says: str) -> Pod:
        pod = self.cluster.run_pod(name, node, {"app": "hello"}, says=says)
        self.pods.append(pod)
        return pod

    def _named(self, name: str) -> Pod:
        return next(pod for pod in self.pods if pod.name == name)

    def _remove(self, pod: Pod) -> None:
        self.pods.remove(pod)
        self.cluster.remove_pod(pod)

    def _rules(self, node: Node) -> Counter[str]:
        """Rules and map elements in a node's kernel, without what comes and goes with traffic."""
        listing = node.exec("nft", "--stateless", "list", "ruleset")
        parts = (part.strip(" {}\t") for part in re.split(r",\s|\n|elements = ", listing))
        return Counter(part for part in parts if part and "expires" not in part)


def _percent(count: int) -> str:
    return f"({100 * count / CONNECTIONS:.0f} %)"


def _spread(seen: Counter[str]) -> str:
    return ", ".join(f"{pod} {count}" for pod, count in sorted(seen.items()))
