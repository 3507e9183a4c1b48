import purerpc
import sgpu.api.podresources_pb2 as sgpu_dot_api_dot_podresources__pb2


class PodResourcesListerServicer(purerpc.Servicer):
    async def List(self, input_message):
        raise NotImplementedError()

    @property
    def service(self) -> purerpc.Service:
        service_obj = purerpc.Service(
            "v1.PodResourcesLister"
        )
        service_obj.add_method(
            "List",
            self.List,
            purerpc.RPCSignature(
                purerpc.Cardinality.UNARY_UNARY,
                sgpu_dot_api_dot_podresources__pb2.ListPodResourcesRequest,
                sgpu_dot_api_dot_podresources__pb2.ListPodResourcesResponse,
            )
        )
        return service_obj


class PodResourcesListerStub:
    def __init__(self, channel):
        self._client = purerpc.Client(
            "v1.PodResourcesLister",
            channel
        )
        self.List = self._client.get_method_stub(
            "List",
            purerpc.RPCSignature(
                purerpc.Cardinality.UNARY_UNARY,
                sgpu_dot_api_dot_podresources__pb2.ListPodResourcesRequest,
                sgpu_dot_api_dot_podresources__pb2.ListPodResourcesResponse,
            )
        )